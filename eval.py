"""Evaluates a checkpoint, samples from it, or diagnoses its mixers.

python eval.py --workdir=runs/first
python eval.py --workdir=runs/first --split=valid --checkpoint=latest --lengths=128,256,512,1024
python eval.py --workdir=runs/first --sample="KING HENRY:" --length=400 --temperature=0.8 --top_p=0.95
python eval.py --workdir=runs/first --diagnose
"""

from absl import flags

from common import command

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "directory of the run")
flags.DEFINE_string("checkpoint", "best", "'best', 'latest' or a step")
flags.DEFINE_string("split", "test", "what to score: train, valid or test")
flags.DEFINE_list("lengths", [], "context lengths; by default the one of training (--diagnose: one, at most 512)")
flags.DEFINE_integer("batches", 0, "score only so many batches; 0 is the whole split")
flags.DEFINE_string("sample", None, "a prompt: generate text instead of scoring")
flags.DEFINE_integer("length", 400, "tokens to generate", lower_bound=1)
flags.DEFINE_float("temperature", 0.8, "of the sampling; 0 takes the likeliest token")
flags.DEFINE_integer("top_k", 0, "sample from the k likeliest tokens; 0 from all")
flags.DEFINE_float("top_p", 1.0, "sample from the likeliest tokens that reach this probability")
flags.DEFINE_integer("seed", 0, "of the sampling")
flags.DEFINE_bool("diagnose", False, "measure reach, gradients and spectra of the mixers, into the run's diagnostics/")
flags.DEFINE_bool("distributed", False, "call jax.distributed.initialize() (pods, several hosts)")


def main(_):
    command.start(FLAGS.distributed)
    from evaluation import scoring
    from evaluation.diagnostics import measures

    model = scoring.load(FLAGS.workdir, FLAGS.checkpoint)
    if FLAGS.sample is not None:
        scoring.sample(
            model,
            FLAGS.sample,
            FLAGS.length,
            temperature=FLAGS.temperature,
            top_k=FLAGS.top_k,
            top_p=FLAGS.top_p,
            seed=FLAGS.seed,
        )
    elif FLAGS.diagnose:
        measures.run(model, [int(n) for n in FLAGS.lengths])
    else:
        scoring.score(model, FLAGS.split, [int(n) for n in FLAGS.lengths], FLAGS.batches)


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    command.run(main)
