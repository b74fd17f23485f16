r"""Pyro programs captured once and run as one compiled graph.

Pyro interprets a program anew at every step: handlers, plates, a trace for each program, checks, and one
optimiser for each parameter. Most of that is the same every time. Here the whole loss is run once under a
tracer, :func:`torch.fx.experimental.proxy_tensor.make_fx`, which records the operators of torch, those of the
derivative included; Inductor compiles the record, and later steps run it.

What can be captured: programs whose sites, shapes and path through Python are the same at every run with
arguments of the same shapes. Random draws are part of the graph. Before anything is compiled the program is
run on copies, to see what running it changes, and captured twice; at calls that grow rarer compiled results
are compared with eager ones. What cannot be captured runs eagerly, with one :class:`NotCompiledWarning`:

- looking at values of tensors (``.item()``, ``if tensor > 0``, ``numpy()``, sizes that depend on data);
- randomness or counters of Python in the path: ``random``, ``numpy.random``, generators of one's own,
  iterators, the time, ``torch.manual_seed``;
- side effects: ``self.calls += 1``, ``self.last_z = z``, appending to a list, changing an argument;
- a set of sites that changes from run to run; arguments of more than a few shapes;
- tensors that require gradients and are neither parameters of a module nor in the store; gradient hooks;
- modules of ``torch.jit``, ``JitTrace_ELBO``, sparse arguments, and ``nn.LSTM`` on a CPU, whose derivative
  torch does not record the same way twice.

What a program reads may change between calls, and is compared before each, which takes 20 µs
(:mod:`pyro_vae.compiled.survey`): attributes and containers of modules and other objects, classes, globals,
closures, hooks, parameters and their layout. Values of tensors are read anew and need no comparison; anything
else that changes gets a graph of its own, up to a few. Of containers of more than 1,000 entries only the
length is compared, and what libraries keep to themselves is not. Printing happens only while a program runs
eagerly or is captured.
"""

from pyro_vae.compiled.capture import Outputs
from pyro_vae.compiled.function import CompiledFunction, NotCompiledWarning
from pyro_vae.compiled.state import CaptureError
from pyro_vae.compiled.step import CompiledStep, can_update

__all__ = ["CaptureError", "CompiledFunction", "CompiledStep", "NotCompiledWarning", "Outputs", "can_update"]
