"""Write the YAML with which ``mergekit-pytorch`` merges the experts of a case.

    python mergekit_config.py --case CASE --method ties --density 0.2 --scaling 0.3 --out ties.yaml
    mergekit-pytorch ties.yaml OUT_FOLDER --quiet --num-threads 2

The experts are read as they are. The base may be the whole CLIP: mergekit takes the tensor names
from the listed models, so only ``visual.*`` is read and written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--method", choices=["task_arithmetic", "average", "ties"], required=True)
    parser.add_argument("--weight", type=float, default=1.0, help="weight of every expert")
    parser.add_argument("--scaling", type=float, default=0.3, help="mergekit's lambda")
    parser.add_argument("--density", type=float, default=0.2, help="ties: fraction kept a tensor")
    parser.add_argument("--normalize", action="store_true", help="ties: mean of agreeing entries")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    text = config(args.case, args.method, args.weight, args.scaling, args.density, args.normalize)
    args.out.write_text(yaml.safe_dump(text, sort_keys=False))


def config(
    case: Path,
    method: str,
    weight: float = 1.0,
    scaling: float = 0.3,
    density: float = 0.2,
    normalize: bool = False,
) -> dict[str, object]:
    """Return mergekit's config of θ₀ + scaling · Σ_k weight · T_k (TIES: of Φ), or of the mean."""
    count = len(list((case / "experts").glob("task*.safetensors")))
    files = [str((case / "experts" / f"task{k}.safetensors").resolve()) for k in range(count)]
    if method == "average":
        return {"merge_method": "linear", "models": _models(files, weight=1.0)}
    own = {"weight": weight, "density": density} if method == "ties" else {"weight": weight}
    return {
        "merge_method": method,
        "base_model": str((case / "pretrained" / "open_clip_model.safetensors").resolve()),
        "models": _models(files, **own),
        "parameters": {"normalize": normalize, "lambda": scaling},
    }


def _models(files: list[str], **parameters: float) -> list[dict[str, object]]:
    return [{"model": file, "parameters": dict(parameters)} for file in files]


if __name__ == "__main__":
    main()
