"""Many live streams on one machine: denoiser, decoder and text encoder, each in a thread of its own (StreamDiT §8,
fig. 11).

from streamdit_jax.live import Engine
with Engine(sd.load("roadtrip"), slots=4) as engine:
    session = engine.open("a red car drives past green hills")
    for chunk in session:          # chunk.frames: uint8 [n, height, width, 3]
        receipt = session.change("a red car drives through snow at night", over=2)
"""

from streamdit_jax.live.engine import Engine
from streamdit_jax.live.session import Chunk, EngineFull, EngineStopped, Session, SessionClosed
from streamdit_jax.timetable import Receipt

__all__ = ["Chunk", "Engine", "EngineFull", "EngineStopped", "Receipt", "Session", "SessionClosed"]
