"""The search from end to end: dense reference, analysis, episodes, refinement of the winners."""

from pathlib import Path

from tvm_compress.data.dataset import Split
from tvm_compress.model import Model
from tvm_compress.search.results import Progress, SearchResult, no_progress
from tvm_compress.search.settings import SearchSettings


def run_search(
    model: Model, split: Split, settings: SearchSettings, study_dir: Path, progress: Progress = no_progress
) -> SearchResult:
    """Search a policy for a model, or go on with the study that stands in `study_dir`."""
    raise NotImplementedError
