"""HQQ folders: safetensors in the hqq package's encoded form, read without evaluating a string (docs/formats/hqq.md).

transformers 5 cannot read HQQ; given a folder with `model.safetensors` it makes random weights without an error. So
the weights are in files of another name here, which it refuses.
"""

from quantkit.formats.hqq.read import READING
from quantkit.formats.hqq.write import NAME

__all__ = ["NAME", "READING"]
