"""The distillation objective: multistep distillation of steps and guidance together, through the one training loop
(StreamDiT §4.2; `streamdit_jax.distill` has the method).

The student starts as the teacher; the teacher, and the text encoders that both read, are constants of the step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax import distill, flops, flow, stream
from streamdit_jax.compiled import encode_text
from streamdit_jax.config import Config
from streamdit_jax.models.dit import DiT
from streamdit_jax.models.text import tokenize
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.sharding import constrain
from streamdit_jax.stages import DistillationStage
from streamdit_jax.training.flow_matching import at_several_levels, frozen, max_tokens, splice
from streamdit_jax.training.objective import Objective


def distillation(config: Config, stage: DistillationStage, teacher: dict[str, Any]) -> Objective:
    """The objective of a student DiT on {"latents", "tokens", "text_mask"}; params {"dit": …}.

    teacher: {"text": {"0": …}, "dit": …}; the student starts as its DiT. Of a batch, the first ⌊rollout_share·b⌋
    examples are states that the student reaches by streaming 1 … `rollout_chunks` chunks from noised clips; of the
    others, shares are at the levels of a filling: `uniform_share` at one level for the whole buffer, `ramp_share`
    ramps up, `doubling_share` doubles; the rest is at the levels of streaming. Metrics: `rollout_loss`, and
    `target_norm`, the mean square of what is learnt.
    """
    scheme = PartitionScheme.parse(stage.scheme)
    start = distill.starts(scheme, stage.teacher_steps)
    masked = any(share > 0 and stream.is_masked(filling) for filling, share in stage.filling_shares().items())
    dit = DiT(config.dit)
    empty_tokens, empty_mask = tokenize("", max_tokens(config.text))

    def velocity(params):
        return lambda latents, text, levels, *present: dit.apply({"params": params}, latents, levels, text, *present)

    def init(key, batch):
        del key
        return {"dit": batch["initial"]["dit"]}

    def loss(params, constants, batch, key):
        level_key, noise_key, place_key, cycle_key, rollout_key = jax.random.split(key, 5)
        size = len(batch["latents"])
        text = encode_text(config.text, constants["text"], batch["tokens"], batch["text_mask"])
        text = tuple((constrain(x, "batch", None, None), mask) for x, mask in text)
        null = encode_text(config.text, constants["text"], empty_tokens[None], empty_mask[None])
        null = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape[1:])), null)
        condition = stream.Condition(text, null, jnp.broadcast_to(constants["guidance"], (size,)))
        student = velocity(params["dit"])
        frozen_student = velocity(jax.lax.stop_gradient(params["dit"]))

        levels, exist, scored = distill.draw_starts(level_key, start, size, constants["shares"])
        rolled = int(stage.rollout_share * size)
        if rolled:  # they are at the first micro step of streaming
            levels, exist = levels.at[:rolled].set(start.streaming.levels[0]), exist.at[:rolled].set(True)
            scored = scored.at[:rolled].set(scheme.chunk_ids() >= 0)
        present = exist if masked else None
        share = constants["switch_share"] * at_several_levels(levels[:, 0], scored)
        clean = splice(jax.random.fold_in(key, 1), batch["latents"], share)
        place = jnp.zeros(size, jnp.int32)
        if stage.method == "consistency":
            place = jax.random.randint(place_key, (size,), 0, stage.teacher_steps).at[:rolled].set(0)
        now = levels[jnp.arange(size), place]
        noise = constrain(jax.random.normal(noise_key, clean.shape), "batch", *[None] * 4)
        begin = flow.interpolate(clean, noise, now)
        if rolled:
            cycles = jax.random.randint(cycle_key, (rolled,), 1, stage.rollout_chunks + 1)
            made = distill.rollout(
                frozen_student,
                begin[:rolled],
                jax.random.split(rollout_key, rolled),
                cycles,
                jax.tree.map(lambda x: x[:rolled], text),
                scheme,
                stage.rollout_chunks,
            )
            begin = begin.at[:rolled].set(made)

        guide = velocity(constants["teacher"])
        if stage.method == "segment":
            target = distill.segment_target(guide, begin, levels, condition, present)
        else:
            target = distill.consistency_target(guide, frozen_student, begin, levels, place, condition, present)
        predicted = student(begin, text, now, *(() if present is None else (present,)))
        rolled_only = scored & (jnp.arange(size) < rolled)[:, None]
        metrics = {"target_norm": flow.loss(target, jnp.zeros_like(target), scored)}
        if rolled:
            metrics["rollout_loss"] = flow.loss(predicted, target, rolled_only)
        return flow.loss(predicted, target, scored), metrics

    constants = {
        "teacher": frozen(teacher["dit"], config.dit.compute_dtype),
        "text": frozen(teacher["text"], config.dit.compute_dtype),
        "guidance": np.float32(stage.guidance),
        "shares": {filling: np.float32(share) for filling, share in stage.filling_shares().items()},
        "switch_share": np.float32(stage.switch_share),
    }

    def count(batch):
        size, forward = len(batch["latents"]), flops.of_model(config, text_is_cached=False)["total"]
        targets = 2 * stage.teacher_steps if stage.method == "segment" else 3
        if stage.guidance == 1:
            targets -= stage.teacher_steps if stage.method == "segment" else 1
        rolled = int(stage.rollout_share * size) * stage.rollout_chunks * scheme.micro_steps
        return forward * ((3 + targets) * size + rolled)

    # An argument of init, as in flow matching: closed over, a large teacher would be compiled into it.
    first_batch = {"initial": {"dit": teacher["dit"]}}
    return Objective("distillation", init, loss, constants, first_batch=first_batch, flops=count)
