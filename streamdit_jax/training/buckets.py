"""Where the batches of a stage come from: its own data, and those of further buckets (joint training on images and
videos, Movie Gen §3.2.1).

A bucket is a shape of batch with data of its own. The stage's own shape is the bucket "main"; flow matching may have
others beside it. What their batches look like is in `training.abstract`.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from streamdit_jax.config import Config
from streamdit_jax.data.input_pipeline import BucketedBatches, make_batches
from streamdit_jax.data.records import Records, open_records
from streamdit_jax.errors import DataError
from streamdit_jax.models.text import tokenize, with_frame_rate
from streamdit_jax.stages import MAIN
from streamdit_jax.training.flow_matching import max_tokens


def stage_batches(config: Config, name: str, source: Records) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """What the loop reads of the stage training.`name`: first step → batches, this process's rows of each.

    source: of the main bucket. DataError, naming it, where the records of a bucket are missing or of another shape, or
    have no frame rate to put before their captions.
    """
    stage = getattr(config.training, name)
    records, tokenizers = {MAIN: source}, {MAIN: _tokenizer(config, name, source, stage.num_frames)}
    for other, bucket in stage.buckets_by_name().items():
        records[other] = _open(config, other) if bucket.source else source
        tokenizers[other] = _tokenizer(config, name, records[other], bucket.latent[0])

    def open_bucket(other: str, first: int):
        bucket = stage.buckets_by_name().get(other)
        return make_batches(
            records[other],
            batch_size=stage.batch_size if bucket is None else bucket.batch_size,
            num_frames=stage.num_frames if bucket is None else bucket.latent[0],
            seed=config.seed,
            tokenize=tokenizers[other],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            first_step=first,
        )

    def batches(first_step: int):
        if len(records) == 1:
            return open_bucket(MAIN, first_step)
        return BucketedBatches(open_bucket, stage.shares(), seed=config.seed, first_step=first_step)

    return batches


def _open(config: Config, name: str) -> Records:
    """The records of a bucket that names its own."""
    field, bucket = f"training.flow_matching.buckets.{name}", config.training.flow_matching.buckets[name]
    records = open_records(bucket.source)
    if records.kind != "latents":
        raise DataError(f"{field}.source: {bucket.source} holds {records.kind}; make latents by `streamdit encode`")
    wanted = (*bucket.latent[1:], config.dit.latent[3])
    if records.shape[1:] != wanted or records.shape[0] < bucket.latent[0]:
        raise DataError(
            f"{field}.source: the clips of {bucket.source} are {records.shape}, which has no "
            f"{(bucket.latent[0], *wanted)}"
        )
    return records


def _tokenizer(config: Config, name: str, records: Records, num_frames: int):
    """Captions to the tokens that the text encoders take; None where no text is read. An image has no frame rate."""
    if name == "autoencoder":
        return None
    longest, rate = max_tokens(config.text), None
    if config.data.frame_rate_prompt and num_frames > 1:
        rate = records.metadata.get("frame_rate")
        if rate is None:
            raise DataError(f"{records.directory}: tells no frame rate for data.frame_rate_prompt; encode it anew")

    def tokens(caption: str):
        return tokenize(caption if rate is None else with_frame_rate(caption, float(rate)), longest)

    return tokens
