"""FLASH as a language model of Wiki-40B or PG-19 (Transformer Quality in Linear Time, arXiv 2202.10447).

    python train.py --config=configs/papers/flash_lm.py:task=wiki40b,length=1024 --workdir=runs/flash --config.task.data_dir=TFDS
    python -m evaluation.expect --workdir=runs/flash

Keys of the argument:
  task: wiki40b or pg19, which TFDS must have prepared as ArrayRecord in data_dir.
  length: 512, 1024, 2048, 4096 or 8192, the paper's contexts.

Expected: no perplexity of the paper is verified, so `expect` has no value, and the command that compares says so. What is
known, from the abstract: FLASH has the perplexity of an improved Transformer from 512 to 8,192 tokens, and trains up to
4.9 times (Wiki-40B) and 12.1 times (PG-19) as fast.

Recipe, UNVERIFIED, from memory of the paper: 24 layers of width 768 (110 million parameters, for 12 layers of a
Transformer), chunks of 256, key size 128, expansion 2, ScaleNorm; 2^18 tokens a step, 125,000 steps, AdamW with a peak of
7e-4 after 10,000 steps of warm-up, then a linear decay, no dropout. Of the tokenizer it is known that Wiki-40B has 32,000
subwords; here they are a BPE of 32,768 that is trained on the training split, so that perplexities per token are not
those of the paper's tokens.

What is not as published: the position bias is rotary at every length; there a table up to 512.

Hours in `expect`: an estimate for one H100, at 200,000 tokens in a second.
"""

from ml_collections import ConfigDict

from configs import common, published

CORPORA = {"wiki40b": "tfds:wiki40b/en", "pg19": "tfds:pg19"}
LENGTHS = {str(length): length for length in (512, 1024, 2048, 4096, 8192)}
STEPS, TOKENS = 125_000, 2**18


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/papers/flash_lm.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/papers/flash_lm.py", task="wiki40b", length="1024")
    corpus = common.choose("task", choice["task"], CORPORA)
    length = common.choose("length", choice["length"], LENGTHS)
    model = common.model(("flash",), 768, 12, norm="scalenorm")
    model.mixer.flash.update({"chunk": 256, "key_size": 128, "expansion": 2.0})
    config = common.experiment(
        published.task("language_model", corpus=corpus, length=length, tokenizer="bpe:32768"),
        model,
        common.optimizer(7e-4, STEPS, schedule="linear", warmup_steps=10_000, final_fraction=0.0),
        published.train(STEPS, TOKENS // length, 25, accumulation=8, compute_dtype="bfloat16"),
    )
    config.expect = published.expect(
        None,
        0.0,
        "arXiv 2202.10447: no perplexity is verified; the abstract says as good as an improved Transformer's",
        metric="perplexity",
        seeds=1,
        hours=published.hours(STEPS * TOKENS, rate=2e5),
    )
    return config
