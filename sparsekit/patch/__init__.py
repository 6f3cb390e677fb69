"""apply / remove: sparsekit's attention under any Hugging Face model, and the model exactly as it was again.

The door is transformers' own: one attention and one mask function are registered under one name, and the model's text
config is switched to it. The mask function g is called once a forward and kind of mask; for a prompt chunk it returns a
small DESCRIPTOR in place of a mask and remembers the call. The attention function f then decides layer by layer:
sparsekit's kernel, or the model's original attention function with the mask that the original mask function would have
given.

Here: `handle` is what is called, `door` what is registered; `attention` and `mask` are the two functions, `compiled` is
their form under torch.compile; `decide` says whether a layer runs sparse, and why not; `call` reads what a model asks
of its attention function; `model` finds the layers, `state` is what is remembered, `report` what is shown, `switch`
guards the model's choice of implementation.
"""

from sparsekit.patch.handle import Handle, apply, remove
from sparsekit.patch.report import LayerReport, Report

__all__ = ["Handle", "LayerReport", "Report", "apply", "remove"]
