"""A checkpoint that computes what another does, with a few channels as loud as large language models have them.

    python -m bench.loud --model DIR --out DIR

One channel in 64 of what every norm puts out is multiplied by 16, 32 or 64, and the columns that read it are divided by
as much: powers of two, so nothing is rounded. To a quantizer such columns are small beside their groups' ranges, and
their errors are large in the outputs.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.index import open_checkpoint

SHARE = 64
POWERS = (4, 5, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    shutil.copytree(options.model, options.out)
    drawn, factors = torch.Generator().manual_seed(0), {}
    stages = {stage.name: stage for stage in checkpoint.family.stages}
    for index in range(checkpoint.num_layers):
        for fold in checkpoint.family.folds:
            if fold.producer.endswith("_proj"):
                continue
            norm = f"model.layers.{index}.{fold.producer}.weight"
            width = checkpoint.tensors.tensors[norm].shape[0]
            factor_I = torch.ones(width)
            loud = torch.randperm(width, generator=drawn)[: max(width // SHARE, 1)]
            factor_I[loud] = 2.0 ** torch.randint(POWERS[0], POWERS[-1] + 1, loud.shape, generator=drawn)
            factors[norm] = factor_I
            readers = stages[fold.stage].linears
            factors |= {f"model.layers.{index}.{reader}.weight": 1 / factor_I for reader in readers}
    for path in options.out.glob("*.safetensors"):
        tensors = load_file(path)
        scaled = {name: (tensor * factors.get(name, 1.0)).to(tensor.dtype) for name, tensor in tensors.items()}
        save_file(scaled, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
