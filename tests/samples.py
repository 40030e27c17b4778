"""What a test knows of an operator of `visionhybrid.kernels`: its function and samples of its arguments."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call. `inputs` are float64 and get gradients; those in `single` are float32 beside half inputs."""

    inputs: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    single: tuple[str, ...] = ()

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """Leaves of `dtype` that want gradients."""
        wide = dtype if dtype == torch.float64 else torch.float32
        return {
            name: x.to(device, wide if name in self.single else dtype, copy=True).requires_grad_()
            for name, x in self.inputs.items()
        }


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A public function, its module and samples; the keys of `samples` say what they show."""

    module: ModuleType | SimpleNamespace  # has `arguments` and BACKENDS
    function: Callable[..., Any]
    samples: dict[str, Callable[[], Sample]]
    small: Callable[[], Sample]  # for gradcheck, compile, export
    drawn: st.SearchStrategy  # of functions that build a Sample
    named: Callable[[dict[str, Tensor]], dict[str, Any]] = dict  # inputs -> keywords of `function`
    ops: Callable[[], list[tuple[Any, tuple]]] = list  # registered operators with arguments, for opcheck
    autocasts: bool = True  # False where autocast leaves the inputs as they are

    def call(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        return self.function(**self.named(inputs), **options)

    def why_not(self, inputs: dict[str, Tensor], backend: str, **options: Any) -> str | None:
        args = self.module.arguments(**self.named(inputs), **options)
        return self.module.BACKENDS[backend].unsupported(*args)
