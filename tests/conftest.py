"""What all tests share."""

import os
import tempfile

import nbval.plugin
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep

# The same examples on every machine, however slow it is.
settings.register_profile("miniclip", deadline=None, derandomize=True)
settings.load_profile("miniclip")


class KernelInEmptyFolder(nbval.plugin.RunningKernel):
    """Runs a chapter as readers may: with nothing beside the notebook."""

    def __init__(self, name: str, cwd: str, **options) -> None:
        self.folder = tempfile.TemporaryDirectory()
        super().__init__(name, cwd=self.folder.name, **options)


nbval.plugin.RunningKernel = KernelInEmptyFolder
