r"""Pyro programs captured once and run as one compiled graph.

Pyro interprets a program anew at every step: handlers, plates, a trace for each program, checks, and one
optimiser for each parameter. Most of that is the same every time. Here the whole loss is run once under a
tracer, :func:`torch.fx.experimental.proxy_tensor.make_fx`, which records the operators of torch, those of the
derivative included; Inductor compiles the record, and later steps run it.

What can be captured: programs whose sites, shapes and path through Python are the same at every run with
arguments of the same shapes. Random draws are part of the graph. Before anything is compiled one of the calls
that were due anyway runs eagerly and is watched (:mod:`pyro_vae.compiled.trial`): what it changes in all that
the programs reach (:mod:`pyro_vae.compiled.heap`), and what it calls besides torch
(:mod:`pyro_vae.compiled.witness`). Nothing is run on top of that, so there is nothing to undo. Then it is
captured twice, and at calls that grow rarer compiled results are compared with watched eager ones. What
cannot be captured runs eagerly, with one :class:`NotCompiledWarning`:

- looking at values of tensors (``.item()``, ``if tensor > 0``, ``numpy()``, sizes that depend on data);
- side effects, wherever they lie and whatever the class inherits from: ``self.calls += 1``,
  ``self.last_z = z``, appending to a list, numbers in an array, changing an argument, another tensor in place
  of a buffer, counts of a library's object such as a scheduler, printing, logging, writing a file, hooks that
  record; what is made once, such as an entry of a cache, is waited for;
- what lies outside of the program: ``random``, ``numpy.random``, generators of one's own, iterators, the
  time, seeds, files, the environment, context variables, tables of pandas, Pyro's store read other than by
  ``pyro.param``;
- a set of sites that changes from run to run; arguments of more than a few shapes; a Python number among
  them that changes again and again;
- tensors that require gradients and are neither parameters of a module nor in the store; parameters that
  are kept in a list as well; under ``PyroSVI`` networks that Pyro does not see; gradient hooks;
- an ELBO with a ``loss_and_grads`` of its own under ``PyroSVI``;
- modules of ``torch.jit``, ``JitTrace_ELBO``, sparse arguments, and ``nn.LSTM`` on a CPU, whose derivative
  torch does not record the same way twice.

What a program reads may change between calls, and is compared before each, which takes microseconds
(:mod:`pyro_vae.compiled.survey`), also where only a library calls the code that reads it: attributes and
containers of modules and other objects, classes, code, defaults, globals, closures, hooks, arrays up to 1 MB,
parameters and their layout. Values of tensors are read anew and need no comparison; anything else that
changes gets a graph of its own, up to a few. Of containers of more than 1,000 entries only the length is
compared. Handlers of torch or Pyro, anomaly detection or a profiler around a step let it run eagerly. Not
seen is what ``threading.local``, queues and values of ``multiprocessing`` hold, and what a tracing handler
keeps. When compiling begins hangs on counts alone (:mod:`pyro_vae.compiled.work`), so that on a CPU a run
that was killed goes on to the same bits.
"""

from pyro_vae.compiled.capture import Outputs
from pyro_vae.compiled.function import CompiledFunction, NotCompiledWarning
from pyro_vae.compiled.owners import register_library, register_programs, register_requirements
from pyro_vae.compiled.state import CaptureError
from pyro_vae.compiled.step import CompiledStep, can_update
from pyro_vae.compiled.survey import Survey

__all__ = [
    "CaptureError",
    "CompiledFunction",
    "CompiledStep",
    "NotCompiledWarning",
    "Outputs",
    "Survey",
    "can_update",
    "register_library",
    "register_programs",
    "register_requirements",
]
