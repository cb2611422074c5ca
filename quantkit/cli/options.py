"""Arguments and options that commands have in common."""

from pathlib import Path
from typing import Annotated

import typer

Name = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe of the default model, <model>/<name>, or a path.")
]
Names = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe of the default model, <model>/<name>, or a path; all or <model>/all for each."
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact.")]
Readable = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact, or a .gguf file.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="DIR_OR_ID", help="Source model instead of the recipe's.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Artifact folder, of several their parent [default: artifacts/<model>-<FORMAT>]."
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cuda|cpu", help="Where to compute.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key; repeatable.")]
Size = Annotated[
    int, typer.Option("--ranks", metavar="N", min=1, help="Processes that make the artifact together, a GPU each.")
]
Junit = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Also write the gates as JUnit XML, for CI systems.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
