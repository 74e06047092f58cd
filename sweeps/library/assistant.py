"""From a base model to an assistant: pretrain on presidential messages, finetune on questions about them, compare.

scaling sweep assistant && scaling chat runs/assistant/runs/43e4abd016e0 runs/assistant/runs/dc4e8ab41a14

Three runs, each from what the one before ended with: next token on the corpus; answers only, on questions about who
spoke when; DPO on pairs of a right and a wrong answer.

Cost: 3.9e12 FLOPs. Result: the base goes on with prose, its children answer in a name; asked for a year that they were
not trained on, they name a president of that time.
"""

from models.config import ModelConfig
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, ScheduleConfig
from sweeps.define import Sweep, children, union

MODEL = ModelConfig(d_model=64, n_layers=4, n_heads=4, rope_theta=100.0)
BASE = RunConfig(
    model=MODEL,
    data=DataConfig(seq_len=128, valid_tokens=65_536),
    optim=OptimConfig(lr=0.01),
    schedule=ScheduleConfig(warmup_tokens=102_400),
    tokens=2_000_000,
    batch_size=4,
)
QUESTIONS = 440  # about, that are trained on
# A row is one question. Each is seen 12 times, each pair twice.
FINETUNED = RunConfig(
    data=DataConfig(source="presidents", seq_len=96, repeat=True, valid_fraction=0.1),
    optim=OptimConfig(lr=0.003),
    schedule=ScheduleConfig(warmup_tokens=9_600),
    objective=ObjectiveConfig("answers_only"),
    tokens=96 * QUESTIONS * 12,
    batch_size=8,
)
COMPARED = RunConfig(
    data=DataConfig(source="presidents:pairs", seq_len=96, repeat=True, valid_fraction=0.1),
    optim=OptimConfig(lr=0.0005),
    schedule=ScheduleConfig(warmup_tokens=9_600),
    objective=ObjectiveConfig("dpo", '{"beta": 0.1}'),
    tokens=96 * QUESTIONS * 2,
    batch_size=8,
)


def sweep() -> Sweep:
    finetuned = children([BASE], {}, FINETUNED)
    return Sweep(union([BASE], finetuned, children(finetuned, {}, COMPARED)))
