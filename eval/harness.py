"""lm-eval's tasks on trained runs (`kvfrontier lm-eval`), YOCO and techniques on caches included.

lm-eval, an extra, finds runs by the name `kvfrontier` in its registry; after `import eval.harness` also as

    lm_eval.simple_evaluate("kvfrontier", {"run": "runs/quick/runs/mla/seed-0"}, tasks=["my_task"])
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  its registry, which loads these where it has none, then knows one
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from archs.sampling import Sampler, stream
from archs.techniques.quantised import is_packed, nothing_packed
from eval.sample import new_cache
from train.errors import InputError
from train.files import read_json, write_json
from train.machine import find_device
from train.trained import load

TOKENS_AT_ONCE = 8192
MADE = 256  # tokens, where a task does not say how many


@register_model("kvfrontier")
class TrainedLM(TemplateLM):
    """A run's model in fp32. `acts`: a technique and its options; each continuation is then decoded token by token."""

    def __init__(self, run: str | Path, acts: dict[str, Any] | None = None, **_: Any):
        super().__init__()
        self.run, self.acts = load(run), acts or {}
        if self.run.tokenizer is None:
            raise InputError(f"{run}: its tokens stand for no text, which lm-eval's tasks are made of")
        self.model = self.run.model.to(find_device())
        self.max_length = self.model.options.context
        self.quantisation, self.packed = None, False  # whether any slot was

    @property
    def eot_token_id(self) -> int:
        return self.run.tokenizer.eot_token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that is predicted from its first token on."""
        return self.run.prefix[0] if self.run.prefix else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.run.tokenizer.encode(string, allowed_special="all")

    def _loglikelihood_tokens(self, requests: Sequence, **_: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it. Contexts that are too long lose
        their beginning."""
        whole = [(context + made)[-self.max_length - 1 :] for _, context, made in requests]
        order = sorted(range(len(requests)), key=lambda n: -len(whole[n]))
        found: dict[int, tuple[float, bool]] = {}
        while order:
            rows = 1 if self.acts or self.run.technique else max(1, TOKENS_AT_ONCE // len(whole[order[0]]))
            batch, order = order[:rows], order[rows:]
            counts = [len(requests[n][2]) for n in batch]
            for n, logits_TV in zip(batch, self.logits([whole[n] for n in batch], counts), strict=True):
                made_T = torch.tensor(whole[n][len(whole[n]) - len(logits_TV) :], device=logits_TV.device)
                nats = logits_TV.float().log_softmax(-1).gather(1, made_T[:, None]).sum().item()
                found[n] = nats, bool((logits_TV.argmax(-1) == made_T).all())
        return [found[n] for n in range(len(requests))]

    @torch.inference_mode()
    def logits(self, whole: list[list[int]], counts: list[int]) -> list[Tensor]:
        """The logits (T, V) from which each of the last T tokens of a text is predicted, T of `counts`."""
        longest, device = max(map(len, whole)), self.model.embed.weight.device
        if any(count >= len(tokens) for tokens, count in zip(whole, counts, strict=True)):
            raise InputError(f"a continuation of {max(counts)} tokens is longer than the context of {self.max_length}")
        tokens_BT = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in whole], device=device)
        if self.acts or self.run.technique:
            prompt = longest - counts[0]
            cache, self.quantisation = new_cache(self.run, self.acts, 1, prompt, longest)
            steps = [self.model.prefill(tokens_BT[:, :prompt], cache)]
            steps += [self.model.decode(token_B, cache) for token_B in tokens_BT[:, prompt:-1].T]
            self.packed |= bool(self.quantisation) and is_packed(cache)
            return [torch.cat(steps)]
        logits_BTV = self.model(tokens_BT[:, :-1])
        ends = [len(tokens) - 1 for tokens in whole]
        return [logits_BTV[n, end - count : end] for n, (end, count) in enumerate(zip(ends, counts, strict=True))]

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token from as many before it as the context holds."""
        found = []
        for (text,) in (request.args for request in requests):
            how = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
            windows = get_rolling_token_windows(token_list=self.tok_encode(text), **how)
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(nats for nats, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Text that goes on from each context, up to the first of the task's stop strings or the end of text."""
        return [self.continuation(*request.args) for request in requests]

    def continuation(self, context: str, how: dict[str, Any]) -> str:
        stops = [how["until"]] if isinstance(how.get("until"), str) else how.get("until") or []
        most = min(how.get("max_gen_toks", MADE), self.max_length - 1)
        sampler = Sampler(temperature=how.get("temperature", 0.0) if how.get("do_sample") else 0.0)
        ids = (self.tok_encode(context) or [self.prefix_token_id])[most - self.max_length :]
        cache, self.quantisation = new_cache(self.run, self.acts, 1, len(ids), len(ids) + most)
        made: list[int] = []
        prompt_1T = torch.tensor([ids], device=self.model.embed.weight.device)
        for token_B in islice(stream(self.model, prompt_1T, sampler, cache), most):
            token = int(token_B)
            if token == self.eot_token_id:
                break
            made.append(token)
            self.packed |= bool(self.quantisation) and is_packed(cache)
            text = self.run.tokenizer.decode(made)
            if places := [place for stop in stops if stop and (place := text.find(stop)) >= 0]:
                return text[: min(places)]
        return self.run.tokenizer.decode(made)


def evaluate(run: Path, tasks: list[str], folder: Path | None, acts: dict[str, Any], **how: Any) -> dict[str, dict]:
    """{task: {metric: value}} of the run; `folder` has YAML files of the user's own tasks. It goes into the run's
    record. InputError if a task is not known or needs what is not there."""
    try:
        manager = TaskManager(include_path=str(folder) if folder else None)
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise InputError(f"--tasks {unknown[0]}: lm-eval knows no such task; --include names a folder of your own")
        model = TrainedLM(run, acts)
        found = simple_evaluate(model, tasks=tasks, task_manager=manager, **how)["results"]
        if model.quantisation and not model.packed:
            raise InputError(nothing_packed(model.quantisation, model.max_length))
    except (OSError, ValueError, KeyError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"--tasks {','.join(tasks)}: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from None
    numbers = {task: {k: v for k, v in row.items() if isinstance(v, int | float)} for task, row in found.items()}
    record = read_json(run / "record.json")
    key = "lm_eval" if not acts else "lm_eval_techniques"
    entries = numbers if not acts else {str(acts): numbers}
    write_json(run / "record.json", record | {key: record.get(key, {}) | entries})
    return numbers
