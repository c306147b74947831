"""What a pass of ours is to a type checker."""

from tvm import IRModule


class ModulePass:
    """Base of our passes, for type checkers only.

    `tvm.transform.module_pass` makes of each class a real TVM pass, which can be called and put into a
    `tvm.ir.transform.Sequential`; a type checker does not see that.
    """

    def __call__(self, module: IRModule) -> IRModule:
        """Apply the pass to a module; TVM's own call stands here in fact."""
        raise NotImplementedError
