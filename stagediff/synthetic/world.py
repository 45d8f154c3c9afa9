"""The planted world: its words and topics, its features, and what each does at every checkpoint. Everything is a function of the TrackWorld.

An activation is x_t = growth(t) * (sum_g w_g(t) a_g e_g(t) + noise): feature g fires by a rule on the token and its topic, with an amplitude a_g that is the
same at all checkpoints, at strength w_g(t), along the unit direction e_g(t). A token feature fires on one word. A concept feature fires on the words
of one topic, within that topic's segments only. A noise feature fires at random places. A change from one rule to another goes linearly over `width`
checkpoints, half of it between checkpoints k and k + 1: that is when the event takes place.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stagediff.synthetic.roles import ROLES
from stagediff.synthetic.spec import TrackWorld

__all__ = ["BLOCK_ROWS", "Feature", "Planted", "Trigger", "ramp"]

BLOCK_ROWS = 256
"""Rows whose random numbers are drawn together."""
WORDS_PER_FEATURE = 1.6
"""Words of the vocabulary per word that some feature is about."""
TOPIC_SHARE = 0.2
"""Share of the vocabulary that belongs to a topic."""
STREAMS = 2
"""Topics that hold at a time: topic i belongs to stream i % STREAMS, and the streams' segments overlap."""
ON_TOPIC = 0.8
"""Share of the tokens that are drawn from the words of one of their topics."""
FLAT_WORDS, FLAT_TOPICS = 10, 5
"""Zipf's law with a flat top: p(rank) ~ 1 / (rank + this)."""
NOISE_DENSITY = (0.01, 0.04)
AMPLITUDE = (0.8, 1.25)
"""Mean amplitude of a feature when it fires; single firings spread by SPREAD around it."""
SPREAD = (0.7, 1.3)
FIRST_EVENT, LAST_EVENT = 4, 6
"""Events lie at least so many checkpoints after the first and before the last."""
MERGED_ANGLE = 15.0
"""Degrees between two merged directions."""
MERGE_SPEED = 4
"""Two merging directions come together at this multiple of the rung's rotation."""


@dataclass(frozen=True)
class Trigger:
    """When a feature fires."""

    kind: str
    words: tuple[int, ...] = ()
    """token, concept: the words it fires on."""
    topic: int | None = None
    """concept: only in this topic's segments."""
    density: float = 1.0
    """noise: share of all tokens."""


@dataclass(frozen=True)
class Feature:
    """One planted feature."""

    index: int
    role: str
    before: Trigger | None
    after: Trigger | None
    event: int | None
    """The checkpoint k before the event, which lies between k and k + 1; None: nothing happens."""
    amplitude: float
    partner: int | None = None
    """merges: the other one of the pair; it is the later one of the two that turns."""


def ramp(t: np.ndarray | float, event: int, width: int) -> np.ndarray:
    """How far a change has gone at checkpoint t: 0 before, 1 after, 1/2 midway between `event` and event + 1."""
    return np.clip((np.asarray(t, float) - event - 0.5) / width + 0.5, 0, 1)


class Planted:
    """A world's words, features and activations."""

    def __init__(self, world: TrackWorld):
        self.world = world
        self._draw = self._generator("features")
        roles = self._roles()
        kinds = [kind for role in roles for kind in _triggers(role)]
        tokens, concepts = kinds.count("token"), kinds.count("concept") - roles.count("merges") // 2
        self.vocab = max(8, round(tokens * WORDS_PER_FEATURE))
        self.topics = max(2, concepts)
        self.word_share = _zipf(self.vocab, FLAT_WORDS)[self._draw.permutation(self.vocab)]
        self.topic_share = _zipf(self.topics, FLAT_TOPICS)[self._draw.permutation(self.topics)]
        size = max(4, round(self.vocab * TOPIC_SHARE))
        self.topic_words = [np.sort(self._draw.choice(self.vocab, size, replace=False)) for _ in range(self.topics)]
        self.features = self._cast(roles)

    def __len__(self) -> int:
        return len(self.features)

    # --- what happens ------------------------------------------------------------------------------------------------------------------

    @cached_property
    def strengths(self) -> tuple[np.ndarray, np.ndarray]:
        """[T, G] strength of each feature's rule before its event and of that after it; they add up to 1 where it has both."""
        still = np.zeros(self.world.checkpoints)  # a merge is a matter of directions alone
        changed = [still if f.event is None or f.partner is not None else self.turned(f.event) for f in self.features]
        gone = np.stack(changed, axis=1)
        has_before, has_after = (np.array([getattr(f, name) is not None for f in self.features]) for name in ("before", "after"))
        return (1 - gone) * has_before, gone * has_after

    @cached_property
    def directions(self) -> np.ndarray:
        """[T, G, d] unit vectors, float64."""
        world, g, n = self.world, self._generator("directions"), len(self)
        start = _unit(g.standard_normal((n, world.d)))
        towards = g.standard_normal((n, world.d))
        towards = _unit(towards - (towards * start).sum(1, keepdims=True) * start)
        moves = np.array([ROLES[f.role].moves for f in self.features])
        step = np.tan(np.radians(world.rung.jitter))
        wandered = np.zeros((n, world.d))
        out = np.empty((world.checkpoints, n, world.d))
        for t in range(world.checkpoints):
            angle = np.radians(world.rung.rotation * t) * moves[:, None]
            wandered += step * _unit(g.standard_normal((n, world.d))) * (t > 0)
            out[t] = _unit(np.cos(angle) * start + np.sin(angle) * towards + wandered)
            for f in self.features:
                if f.partner is not None and f.partner < f.index:
                    assert f.event is not None
                    out[t, f.index] = _towards(out[t, f.index], out[t, f.partner], float(self.merged(f.event)[t]))
        return out

    def turned(self, event: int) -> np.ndarray:
        """[T] how far a change at that event has gone."""
        return ramp(np.arange(self.world.checkpoints), event, self.world.rung.width)

    def merged(self, event: int) -> np.ndarray:
        """[T] how far a merge with its middle at that event has gone."""
        width = max(1, round((90 - MERGED_ANGLE) / (MERGE_SPEED * self.world.rung.rotation)))
        return ramp(np.arange(self.world.checkpoints), event, width)

    def growth(self, checkpoint: int) -> float:
        """Factor on all activations of a checkpoint."""
        return float(self.world.growth ** (checkpoint / (self.world.checkpoints - 1)))

    # --- rows and activations ------------------------------------------------------------------------------------------------------------

    def rows(self, split: str, block: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's tokens, int32 [BLOCK_ROWS, context], and their topics, int32 [BLOCK_ROWS, context, STREAMS]."""
        world, g = self.world, self._generator("rows", split, block)
        segments = -(-world.context // world.segment) + 1
        topics = np.empty((BLOCK_ROWS, world.context, STREAMS), np.int32)
        for stream in range(STREAMS):
            mine = np.arange(stream, self.topics, STREAMS)
            share = self.topic_share[mine]
            drawn = g.choice(mine, (BLOCK_ROWS, segments), p=share / share.sum())
            shift = stream * world.segment // STREAMS
            topics[..., stream] = np.repeat(drawn, world.segment, axis=1)[:, shift : shift + world.context]
        ids = g.choice(self.vocab, topics.shape[:2], p=self.word_share)
        chosen = np.take_along_axis(topics, g.integers(STREAMS, size=ids.shape)[..., None], axis=2)[..., 0]
        chosen[g.random(ids.shape) >= ON_TOPIC] = -1
        for topic, words in enumerate(self.topic_words):
            here = chosen == topic
            share = self.word_share[words]
            ids[here] = g.choice(words, int(here.sum()), p=share / share.sum())
        return ids.astype(np.int32), topics

    def amplitudes(self, ids: np.ndarray, topics: np.ndarray, split: str, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Amplitudes [tokens, G] float32 of a block under every feature's rule before its event, and under that after it (0: does not fire).

        `ids`, `topics`: the block's rows, or its first ones.
        """
        g = self._generator("firings", split, block)
        u = g.random((ids.size, len(self)), dtype=np.float32)
        before, after = (self._rules([getattr(f, name) for f in self.features]) for name in ("before", "after"))
        mean = np.array([f.amplitude for f in self.features], np.float32)
        return _amplitudes(ids, topics, before, u, mean), _amplitudes(ids, topics, after, u, mean)

    def activations(
        self, ids: np.ndarray, topics: np.ndarray, split: str, block: int, checkpoint: int, *, noise: bool = True
    ) -> np.ndarray:
        """Activations [tokens, d] float32 of a block (or its first rows) at a checkpoint; without `noise`: what the features alone give."""
        before, after = self.amplitudes(ids, topics, split, block)
        w_before, w_after = (w[checkpoint].astype(np.float32) for w in self.strengths)
        x = (before * w_before + after * w_after) @ self.directions[checkpoint].astype(np.float32)
        if noise:
            g = self._generator("noise", split, block, checkpoint)
            x += np.float32(self.world.rung.noise) * g.standard_normal(x.shape, dtype=np.float32)
        return x * np.float32(self.growth(checkpoint))

    def meanings(self, ids: np.ndarray, topics: np.ndarray, split: str, block: int) -> np.ndarray:
        """The reference space [tokens, d] float32: a direction per topic, half as much of one per word, and a little noise."""
        g = self._generator("meanings")
        topic, word = (_unit(g.standard_normal((n, self.world.d))).astype(np.float32) for n in (self.topics, self.vocab))
        noise = self._generator("meanings", split, block).standard_normal((ids.size, self.world.d), dtype=np.float32)
        meant = topic[topics.reshape(-1, STREAMS)].sum(1)
        return meant + np.float32(0.5) * word[ids.ravel()] + np.float32(0.3 / self.world.d**0.5) * noise

    # --- drawing it ----------------------------------------------------------------------------------------------------------------------

    def _roles(self) -> list[str]:
        """The role of every feature, by largest remainders; merging ones in pairs, at the end."""
        n, shares = self.world.features, self.world.shares
        wanted = {role: share / sum(shares.values()) * n for role, share in shares.items()}
        pairs = round(wanted.pop("merges", 0) / 2)
        count = {role: int(w) for role, w in wanted.items()}
        left = max(0, n - 2 * pairs - sum(count.values()))
        for role in sorted(wanted, key=lambda r: count[r] - wanted[r])[:left]:
            count[role] += 1
        return [role for role in ROLES for _ in range(count.get(role, 0))] + ["merges"] * (2 * pairs)

    def _cast(self, roles: list[str]) -> tuple[Feature, ...]:
        g = self._draw
        words, topics = iter(g.permutation(self.vocab).tolist()), iter(g.permutation(self.topics).tolist())
        out: list[Feature] = []

        def trigger(kind: str | None) -> Trigger | None:
            if kind == "token":
                return Trigger("token", (next(words),))
            if kind == "concept":
                topic = next(topics)
                return Trigger("concept", tuple(self.topic_words[topic].tolist()), topic)
            return Trigger("noise", density=float(np.exp(g.uniform(*np.log(NOISE_DENSITY))))) if kind == "noise" else None

        def add(role: str, before: Trigger | None, after: Trigger | None, event: int | None, partner: int | None = None) -> None:
            out.append(Feature(len(out), role, before, after, event, float(g.uniform(*AMPLITUDE)), partner))

        def event() -> int:
            return int(g.integers(FIRST_EVENT, self.world.checkpoints - LAST_EVENT))

        for name in roles:
            role = ROLES[name]
            if not role.merges:
                before = trigger(role.before)
                add(name, before, before if role.pattern is None else trigger(role.after), event() if role.pattern else None)
        for _ in range(roles.count("merges") // 2):
            topic, first = next(topics), len(out)
            when = int(g.integers(self.world.checkpoints // 3 + 1, 2 * self.world.checkpoints // 3))
            mixed = g.permutation(self.topic_words[topic])
            for half, partner in ((mixed[::2], first + 1), (mixed[1::2], first)):
                rule = Trigger("concept", tuple(sorted(half.tolist())), topic)
                add("merges", rule, rule, when, partner)
        return tuple(out)

    def _rules(self, triggers: list[Trigger | None]) -> "_Rules":
        member = np.zeros((self.vocab, len(triggers)), bool)
        topic, density = np.full(len(triggers), -1, np.int32), np.ones(len(triggers), np.float32)
        for i, rule in enumerate(triggers):
            if rule is not None:
                member[list(rule.words) if rule.kind != "noise" else slice(None), i] = True
                topic[i] = -1 if rule.topic is None else rule.topic
                density[i] = rule.density
        return _Rules(member, topic, density)

    def _generator(self, *what: str | int) -> np.random.Generator:
        """Random numbers for one purpose, independent of all others."""
        name = "/".join(map(str, what))
        digest = hashlib.sha256(f"{self.world.seed}/{name}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "big"))


@dataclass(frozen=True)
class _Rules:
    """The rules of all features as tables."""

    member: np.ndarray
    """[vocab, G] whether the feature may fire on the word."""
    topic: np.ndarray
    """[G] the only topic it fires in; -1: any."""
    density: np.ndarray
    """[G] share of those places at which it does."""


def _amplitudes(ids: np.ndarray, topics: np.ndarray, rules: _Rules, u: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Amplitudes [tokens, G]; `u` [tokens, G] uniform numbers that decide whether and how strongly features fire."""
    in_topic = (rules.topic == -1) | (topics.reshape(-1, STREAMS)[:, rules.topic % STREAMS] == rules.topic)
    fires = rules.member[ids.ravel()] & in_topic & (u < rules.density)
    low, high = SPREAD
    return np.where(fires, mean * (low + (high - low) / rules.density * u), np.float32(0)).astype(np.float32)


def _triggers(role: str) -> list[str]:
    """The kinds of the rules that a feature of this role needs."""
    r = ROLES[role]
    return [kind for kind in ((r.before, r.after) if r.pattern else (r.before,)) if kind is not None]


def _zipf(n: int, flat: int) -> np.ndarray:
    share = 1 / (np.arange(n) + flat)
    return share / share.sum()


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _towards(direction: np.ndarray, towards: np.ndarray, share: float) -> np.ndarray:
    """`direction` [d] turned towards another by that share of the way to MERGED_ANGLE; both unit vectors."""
    across = _unit(direction - (direction @ towards) * towards)
    angle = np.arccos(np.clip(direction @ towards, -1, 1))
    angle -= share * max(0.0, angle - np.radians(MERGED_ANGLE))
    return np.cos(angle) * towards + np.sin(angle) * across
