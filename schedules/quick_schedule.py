"""A TensorIR schedule without the checks of its callers' types, which take a third of scheduling's time."""

from tvm import s_tir


class QuickSchedule(s_tir.Schedule):
    """TVM's schedule, whose methods are those that it decorates: what they cannot do, C++ refuses."""


def _leave_out_checks() -> None:
    for name, method in vars(s_tir.Schedule).items():
        unchecked = getattr(method, "__wrapped__", None)
        if unchecked is not None:
            setattr(QuickSchedule, name, unchecked)


_leave_out_checks()
