r"""Matrix products of a captured graph, each by the faster of two libraries.

On a CPU torch sends ``mm`` and ``addmm`` to MKL, which runs float32 at half the speed of oneDNN on some
machines and at about the same on others. Both compute in float32. They are timed once for each size, when a
graph is captured, and the products of the graph are rewritten where oneDNN is faster.
"""

import timeit

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_MIN_FLOPS = 1e6  # below, calling the operator costs more than there is to gain
_CLEARLY_FASTER = 0.95

_library = torch.library.Library("compiled_programs", "DEF")
_library.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    r""":math:`x W^T + b` by oneDNN, whose own operator Inductor takes only with constant weights."""
    return torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, "none", [], "")


def _linear_shape(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[0])


_library.impl("linear", _linear, "CPU")
_library.impl("linear", _linear_shape, "Meta")


def choose_products(graph: fx.Graph, choices: dict[str, str]) -> None:
    """Rewrite the products of a graph that oneDNN computes faster.

    Args:
        graph: Of ATen operators, with shapes in ``node.meta["val"]``; changed in place.
        choices: ``"onednn"`` or ``"mkl"`` by the sizes of a product; sizes that are not there are timed and
            added, so that a run that goes on later computes by the same libraries.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for node in list(graph.nodes):
        if node.target is _aten.mm.default:
            bias, (left, right) = None, node.args[:2]
        elif node.target is _aten.addmm.default and not node.kwargs and node.args[0].meta["val"].ndim == 1:
            bias, left, right = node.args
        else:
            continue
        a, b = left.meta["val"], right.meta["val"]
        if a.device.type != "cpu" or a.dtype != torch.float32:
            continue
        if 2 * a.shape[0] * a.shape[1] * b.shape[1] < _MIN_FLOPS:
            continue
        # Strides matter: a product of transposed matrices is another piece of work.
        size = f"{a.shape[0]}x{a.shape[1]}x{b.shape[1]} {a.stride()} {b.stride()} {bias is not None}"
        if size not in choices:
            choices[size] = faster(
                *(_filled(n) for n in (left, right)), None if bias is None else _filled(bias)
            )
        if choices[size] == "onednn":
            with graph.inserting_before(node):
                weight = graph.call_function(_aten.t.default, (right,))
                product = graph.call_function(
                    torch.ops.compiled_programs.linear.default, (left, weight, bias)
                )
            product.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(product)
            graph.erase_node(node)


def _filled(node: fx.Node) -> Tensor:
    like = node.meta["val"]
    return torch.empty_strided(like.shape, like.stride()).fill_(0.5)


def faster(left: Tensor, right: Tensor, bias: Tensor | None = None) -> str:
    """``"onednn"`` or ``"mkl"``, whichever computes this product (plus bias) in less time."""

    def mkl() -> Tensor:
        return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)

    def onednn() -> Tensor:
        return torch.ops.compiled_programs.linear(left, right.t(), bias)

    flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
    repeat = int(min(30, max(3, 3e9 // flops)))
    best = {mkl: float("inf"), onednn: float("inf")}
    with torch.no_grad():
        for _ in range(5):  # in turn, so that a disturbance meets both
            for library in best:
                library()
                best[library] = min(best[library], timeit.timeit(library, number=repeat))
    return "onednn" if best[onednn] < _CLEARLY_FASTER * best[mkl] else "mkl"
