"""apply / remove: sparsekit's attention under any Hugging Face model, and the model exactly as it was again.

The door is transformers' own: one attention and one mask function are registered under one name, and the model's text
config is switched to it. The mask function g is called once a forward and kind of mask; for a prompt chunk it returns a
small DESCRIPTOR in place of a mask and remembers the call. The attention function f then decides layer by layer:
sparsekit's kernel, or the model's original attention function with the mask that the original mask function would have
given.

Here: `contract` and `handle` are what is called, `door` what is registered; `attention` and `mask` are the two
functions, `compiled` is their form under torch.compile; `decide` says whether a layer runs sparse, and why not; `call`
reads what a model asks of its attention function; `model` finds the layers, `state` is what is remembered, `report`
what is shown, `switch` guards the model's choice of implementation. `contract` holds a config to its budget:
`user_prompts` are what it measures on, `divergence` is the measure, `giving_back` the search for the layers that exceed
it, `check_report` what it found.
"""

from sparsekit.patch.check_report import CheckReport, Divergence
from sparsekit.patch.contract import apply, check
from sparsekit.patch.handle import Handle, remove
from sparsekit.patch.report import LayerReport, Report

__all__ = ["CheckReport", "Divergence", "Handle", "LayerReport", "Report", "apply", "check", "remove"]
