"""Which module is running: a stack kept by global forward hooks, so that no module is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ModuleStack:
    """The modules of one model that are running now, outermost first."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.last_running = ""

    @property
    def name(self) -> str:
        """Qualified name of the innermost running module; "" is the model itself."""
        return self.names[self.running[-1]] if self.running else ""

    @contextmanager
    def followed(self, on_enter: Callable[[nn.Module, tuple[Any, ...]], None] | None = None) -> Iterator[None]:
        """Keep the stack while the context is open; ``on_enter`` sees each module and its inputs."""

        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if module in self.names:
                self.running.append(module)
                self.last_running = self.name
                if on_enter is not None:
                    on_enter(module, inputs)

        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if module in self.names:
                while self.running and self.running.pop() is not module:
                    pass

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.running.clear()
