"""Make transformers know the sparse form, without importing it before somebody else does.

`import prune_llm` must stay cheap, and `AutoModelForCausalLM.from_pretrained` must then load a
sparse directory. So the quantizer is registered when transformers' table of quantizers is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register now if transformers' table is there, else as soon as it is imported. Idempotent."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    import prune_llm.integration as integration

    # when that module is just being imported, and imported the table, it has no functions yet and
    # registers at its own end
    if hasattr(integration, "register"):
        integration.register()


class _AfterImport(MetaPathFinder):
    """Finds nothing itself: it lets the other finders find the table, and runs code after it.

    It removes itself at the first use, so that no other import goes through it.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
