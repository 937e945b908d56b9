"""Makes the quantization method "prefixquant" known to transformers, as soon as transformers is there to know it.

`import pq_ao` has to be enough for `from_pretrained`, whichever of the two is imported first; and `import pq_ao.ops`
must not import transformers. So where transformers is not loaded yet, registration waits for the module that holds its
registries.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRIES = "transformers.quantizers.auto"


def _register() -> None:
    # light: it imports what transformers itself has just imported
    importlib.import_module("pq_ao.checkpoint.quantizer")


class _AfterImport(MetaPathFinder):
    """Lets `transformers.quantizers.auto` be imported as always, and registers behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        sys.meta_path.remove(self)
        load = spec.loader.exec_module

        def load_then_register(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_then_register  # a loader belongs to its one spec
        return spec


def register_with_transformers() -> None:
    """Registers now if transformers has its registries loaded, else right after it loads them."""
    if _REGISTRIES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
