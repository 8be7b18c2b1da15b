"""lm-evaluation-harness as the oracle: its own task files and scoring code, with rows from a file
in place of the hub's.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TASK_FILES = {  # our name -> its file under lm_eval/tasks
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "truthfulqa_gen": "truthfulqa/truthfulqa_gen.yaml",
    "crows_pairs_english": "crows_pairs/crows_pairs_english.yaml",
    "ethics_cm": "hendrycks_ethics/commonsense.yaml",
    "ethics_justice": "hendrycks_ethics/justice.yaml",
    "ethics_deontology": "hendrycks_ethics/deontology.yaml",
    "ethics_utilitarianism": "hendrycks_ethics/utilitarianism.yaml",
    "ethics_virtue": "hendrycks_ethics/virtue.yaml",
    "toxigen": "toxigen/toxigen.yaml",
    "winogrande": "winogrande/default.yaml",
    "bbq": "bbq/bbq_multiple_choice.yaml",
    **{
        name: f"bigbench/multiple_choice/{name}.yaml"
        for name in (
            "hhh_alignment",
            "fact_checker",
            "moral_permissibility",
            "bbq_lite_json",
            "known_unknowns",
            "simple_ethical_questions",
        )
    },
}


def logprobs(model: Path, requests: Sequence[tuple[str, str]]) -> list[float]:
    """Of each (context, continuation), as lm-evaluation-harness has it."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8)
    asked = [Instance("loglikelihood", {}, request, 0) for request in requests]
    return [logprob for logprob, _ in lm.loglikelihood(asked, disable_tqdm=True)]


def run(
    model: Path, files: Mapping[str, Path], scratch: Path, gen_tokens: int = 20
) -> dict[bool, dict[str, dict[str, Any]]]:
    """{add_bos_token:

    {task: {"scores": {metric: value}, "logprobs": [row][choice] or "answers": [row]}}}, as it finds
    them offline.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    datasets.disable_progress_bars()
    built = {}
    for name, file in files.items():
        config = load_yaml(Path(lm_eval.tasks.__file__).parent / TASK_FILES[name])
        split = config.get("test_split") or config["validation_split"]
        config |= {
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "training_split": None,
            "dataset_kwargs": {"data_files": {split: str(file)}, "cache_dir": str(scratch)},
        }
        if config["output_type"] == "generate_until":
            config["generation_kwargs"] = {
                "until": ["\n\n"],
                "do_sample": False,
                "max_gen_toks": gen_tokens,
            }
        config.pop("tag", None)
        built[name] = ConfigurableTask(config=config)
    found = {}
    for bos in (True, False):
        lm = HFLM(
            pretrained=str(model), device="cpu", dtype="float32", batch_size=8, add_bos_token=bos
        )
        out = evaluate(lm, built, log_samples=True, bootstrap_iters=0)
        found[bos] = {name: findings(out["results"][name], out["samples"][name]) for name in files}
    return found


def overlap(row: dict[str, Any], answer: str) -> dict[str, float]:
    """truthfulqa_gen's scores of an answer to a row."""
    from lm_eval.tasks.truthfulqa.utils import preprocess_function, process_results_gen

    return {
        key: float(value)
        for key, value in process_results_gen(preprocess_function(row), [answer]).items()
    }


def findings(results: Mapping[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    scores = {
        key.split(",")[0]: value
        for key, value in results.items()
        if key.endswith(",none") and "_stderr" not in key
    }
    responses = [
        [response[0] for response in sample["resps"]]
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]
    if isinstance(responses[0][0], str):
        return {"scores": scores, "answers": [row[0] for row in responses]}
    return {"scores": scores, "logprobs": [[float(value) for value, _ in row] for row in responses]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
