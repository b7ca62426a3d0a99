"""Make a module's weights and gradients views into two flat vectors.

Legend: P columns of the flat vector.
"""

from __future__ import annotations

from torch import Tensor, nn

from raymerge.merging.layout import ParameterLayout


def view_flat(
    module: nn.Module, layout: ParameterLayout, theta_P: Tensor, gradient_P: Tensor
) -> None:
    """Make the module's tensors that ``layout`` names views into ``theta_P``.

    Writing ``theta_P`` changes the module; a backward pass adds into ``gradient_P``. Buffers, such
    as BatchNorm's running statistics, are merged too; their gradient stays zero.
    """
    parameters = dict(module.named_parameters())
    gradients = layout.views(gradient_P)
    for name, view in layout.views(theta_P).items():
        if name in parameters:
            parameters[name].data = view
            parameters[name].requires_grad_(True)
            parameters[name].grad = gradients[name]
        else:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = view
