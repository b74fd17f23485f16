r"""Pyro programs captured once and run as one compiled graph.

Pyro interprets a program anew at every step: handlers, plates, a trace for each program, checks, and one
optimiser for each parameter. Most of that is the same every time. Here the whole loss is run once under a
tracer, :func:`torch.fx.experimental.proxy_tensor.make_fx`, which records the operators of torch, those of the
derivative included; Inductor compiles the record, and later steps run it.

What can be captured: programs whose sites, shapes and path through Python are the same at every run with
arguments of the same shapes. Random draws are part of the graph. What cannot, and therefore runs eagerly with
one :class:`NotCompiledWarning`:

- looking at values of tensors (``.item()``, ``if tensor > 0``, ``numpy()``, sizes that depend on data);
- randomness or counters of Python in the path: ``random``, ``numpy.random``, ``self.calls += 1``;
- a set of sites that changes from run to run;
- arguments of more than a few different shapes.

Side effects in Python (printing, appending to a list) happen while a program runs eagerly or is captured, and
not afterwards. Values in containers (a list or dict in an attribute) are taken as they are at capture.
"""

from pyro_vae.compiled.capture import CaptureError, Outputs
from pyro_vae.compiled.function import CompiledFunction, NotCompiledWarning
from pyro_vae.compiled.step import CompiledStep, can_update

__all__ = ["CaptureError", "CompiledFunction", "CompiledStep", "NotCompiledWarning", "Outputs", "can_update"]
