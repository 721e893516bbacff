"""On which side do rounding errors put scores that are equal mathematically, and what does it do to IJB's 1:1 rates?

    python benchmarks/tied_scores.py [--out tied_scores.json]

Small sets with many equal scores: embeddings of signs only, and duplicate images. Each is measured three ways: with
scores added up in float32 and float64 as InsightFace's scripts add them; the same with the dimensions of all embeddings
shuffled, which changes nothing but the order of additions; and by this package, in both orders. A case differs when
some TPR at some FPR does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from insightface_kprpe.evaluation import ijb
from insightface_kprpe.evaluation.metrics import tpr_at_fpr

TEMPLATES, PAIRS, SEEDS = 60, 1000, 12
Rates = dict[float, float]


def draw(kind: str, seed: int, dim: int, images: int) -> tuple[np.ndarray, ...]:
    """Embeddings, templates, medias, p1, p2, label."""
    rng = np.random.default_rng(seed)
    person = rng.integers(0, TEMPLATES // 4, TEMPLATES)
    templates = np.repeat(np.arange(TEMPLATES), images)
    centers = rng.normal(size=(TEMPLATES, dim))
    if kind == "signs":
        embeddings = np.sign(centers[person[templates]] + rng.normal(size=(len(templates), dim)))
    else:
        other = rng.random(len(templates)) < 0.3
        embeddings = centers[np.where(other, rng.integers(0, TEMPLATES // 4, len(templates)), person[templates])]
    p1 = rng.integers(0, TEMPLATES, PAIRS)
    p2 = (p1 + rng.integers(1, TEMPLATES, PAIRS)) % TEMPLATES
    medias = rng.integers(0, 3, len(templates))
    return embeddings.astype(np.float32), templates, medias, p1, p2, person[p1] == person[p2]


def added_as_scripts_do(
    embeddings: np.ndarray, templates: np.ndarray, medias: np.ndarray, p1: np.ndarray, p2: np.ndarray, label: np.ndarray
) -> Rates:
    """Media means and template sums in the embeddings' type, cosines one product after the other in float64."""
    pooled = np.zeros((TEMPLATES, embeddings.shape[1]))
    for template in range(TEMPLATES):
        own = templates == template
        parts = [embeddings[own & (medias == media)].mean(0) for media in np.unique(medias[own])]
        pooled[template] = np.sum(parts, 0)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    scores = (pooled[p1] * pooled[p2]).sum(-1)
    return {point.target: point.tpr for point in tpr_at_fpr(scores, label, ijb.FPRS, rule="insightface")}


def ours(embeddings: np.ndarray, *lists: np.ndarray) -> Rates:
    result = ijb.verification(embeddings, *lists)
    return {fpr: result[f"tpr_at_fpr_{fpr}"] for fpr in ijb.FPRS}


def differs(a: Rates, b: Rates) -> float:
    """The largest difference of two TPRs."""
    return max(abs(a[fpr] - b[fpr]) for fpr in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="write the figures here as JSON")
    out = parser.parse_args().out
    figures = []
    print(f"{'embeddings':12}{'images':>8}{'cases':>7}  cases in which a TPR differs, and by how many points at most")
    for kind in ("signs", "duplicates"):
        for images in (1, 3):
            gaps = []
            for dim in (32, 64, 512):
                for seed in range(SEEDS):
                    embeddings, *lists = draw(kind, seed, dim, images)
                    shuffled = embeddings[:, np.random.default_rng(seed).permutation(dim)]
                    script, again = (added_as_scripts_do(values, *lists) for values in (embeddings, shuffled))
                    here, here_again = (ours(values, *lists) for values in (embeddings, shuffled))
                    gaps.append((differs(script, again), differs(here, here_again), differs(here, script)))
            gaps = np.array(gaps)
            names = ("script, shuffled", "here, shuffled", "here and script")
            counts, most = (gaps > 1e-9).sum(0).tolist(), (100 * gaps.max(0)).round(2).tolist()
            row = {name: list(pair) for name, *pair in zip(names, counts, most, strict=True)}
            figures.append({"embeddings": kind, "images": images, "cases": len(gaps), **row})
            cells = "   ".join(f"{name}: {count} ({most:.1f})" for name, (count, most) in row.items())
            print(f"{kind:12}{images:>8}{len(gaps):>7}  {cells}", flush=True)
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
