"""Trains the zoo model, a byte-level Llama with grouped-query attention, on the Python standard library's own text.

    python -m effkit.zoo.train --out FOLDER --minutes 120

Muon on the matrices of the blocks, AdamW on embedding and norms, a constant learning rate that falls linearly to zero
over the second half of the run. The first half trains on windows of half the context, where attention is cheaper.
The schedule follows the clock, so that a run ends when it should on any machine, and therefore does not repeat bit for
bit. Each logged row goes to FOLDER/train.jsonl; the weights are saved in bf16.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effkit.zoo.text import stdlib_text

CONTEXT = 512
END = 256  # separates documents; also the padding token. Ids 0..255 are the bytes themselves.
ARCHITECTURE: dict[str, Any] = dict(
    vocab_size=257, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=16,
    num_key_value_heads=8, head_dim=16, max_position_embeddings=CONTEXT, rope_theta=10000.0, tie_word_embeddings=True,
    bos_token_id=END, eos_token_id=END, pad_token_id=END,
)  # fmt: skip


def corpus(split: str, kind: str = "source", limit: int | None = None) -> Tensor:
    """The documents of a split in one row of token ids, each behind an END: int64 [N]."""
    ids = [
        torch.cat((torch.tensor([END]), torch.frombuffer(bytearray(text), dtype=torch.uint8).long()))
        for text in stdlib_text(split, limit, kind=kind)
        if text
    ]
    return torch.cat(ids)


def batch_of(ids: Tensor, rows: int, context: int, generator: torch.Generator) -> Tensor:
    """`rows` random windows of `context` tokens and the one that follows: int64 [rows, context + 1]."""
    starts = torch.randint(len(ids) - context - 1, (rows, 1), generator=generator)
    return ids[starts + torch.arange(context + 1)]


def loss_of(model: torch.nn.Module, batch: Tensor) -> Tensor:
    """Mean next-byte cross entropy in nats, matrix products in bf16."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def heldout_nats(model: torch.nn.Module, ids: Tensor, windows: int, rows: int) -> float:
    """Nats per byte over evenly spaced, non-overlapping held-out windows."""
    windows = min(windows, (len(ids) - 1) // CONTEXT)
    starts = torch.linspace(0, len(ids) - CONTEXT - 1, windows, device=ids.device).long()[:, None]
    batches = ids[starts + torch.arange(CONTEXT + 1, device=ids.device)].split(rows)
    return sum(loss_of(model, batch).item() * len(batch) for batch in batches) / windows


def optimizers_of(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest (embedding, norms)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def lr_factor(step: int, progress: float, warmup: int = 100, cooldown: float = 0.5) -> float:
    """Linear warm-up over `warmup` steps, a plateau, then linearly to zero over the last `cooldown` of the run."""
    return min(1.0, (step + 1) / warmup, (1 - progress) / cooldown)


def train(out: Path, minutes: float, rows: int, lr: float, seed: int, device: str, every: int) -> None:
    """Trains, logs to out/train.jsonl and saves model and tokenizer to `out`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from effkit.zoo.tokenizer import build_tokenizer

    torch.manual_seed(seed)  # LlamaForCausalLM draws its initial weights from the global generator
    model: Any = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    model.to(device)
    compiled: Any = torch.compile(model)
    train_ids, heldout_ids = corpus("train"), corpus("heldout").to(device)
    optimizers = optimizers_of(model, lr)
    generator = torch.Generator().manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "train.jsonl").open("w")

    def write(**row: Any) -> None:
        log.write(json.dumps(row) + "\n")
        log.flush()
        print(row, flush=True)

    write(
        parameters=sum(p.numel() for p in model.parameters()),
        train_bytes=len(train_ids),
        heldout_bytes=len(heldout_ids),
        minutes=minutes,
        rows=rows,
        context=CONTEXT,
        lr=lr,
        seed=seed,
        device=device,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
    )
    start, average, step, tokens, progress = time.time(), 0.0, 0, 0, 0.0
    while progress < 1.0:
        context = CONTEXT // 2 if progress < 0.5 else CONTEXT
        batch = batch_of(train_ids, rows * CONTEXT // context, context, generator)
        loss = loss_of(compiled, batch.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor(step, progress)
            optimizer.step()
            optimizer.zero_grad()
        average = 0.98 * average + 0.02 * loss.item() if step else loss.item()
        step, tokens = step + 1, tokens + rows * CONTEXT
        progress = min(1.0, (time.time() - start) / (60 * minutes))
        if step % every == 0 or progress == 1.0:
            write(
                step=step, seconds=round(time.time() - start), tokens=tokens, train_nats=round(average, 4),
                heldout_nats=round(heldout_nats(compiled, heldout_ids, 64, rows), 4),
            )  # fmt: skip
            torch.save(model.state_dict(), out / "latest.pt")
    write(final_heldout_nats=round(heldout_nats(compiled, heldout_ids, len(heldout_ids), rows), 4))
    (out / "latest.pt").unlink()
    model.to(torch.bfloat16).save_pretrained(out)
    build_tokenizer().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--rows", type=int, default=16, help="windows per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between logged rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default all")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    train(args.out, args.minutes, args.rows, args.lr, args.seed, args.device, args.every)


if __name__ == "__main__":
    main()
