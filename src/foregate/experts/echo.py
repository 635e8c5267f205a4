"""The policy ``echo``: forget what the routing's own past says is needed last. Knows keys and routing, not bytes.

Per MoE layer it keeps decayed means of the routing at several rates and a window of past tokens. Past tokens that were
routed like the newest one vote, by similarity, with what was needed after *them*.
Shapes: T tokens, k chosen, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from foregate.errors import ConfigError, IntegrityError
from foregate.experts.trust import Trust
from foregate.native.echo import MOST_CHOSEN, NEGATIVE, SEEN, EchoPast, EchoRules, Lowest, available
from foregate.types import ExpertKey

Floats = NDArray[np.float32]
Advice = tuple[Floats, Floats]

WINDOW = 1 << 16
"""Numbers kept per layer and array: the window has ``WINDOW`` / E tokens, 1,024 at most."""
MOST_TOKENS = 1024
SHARPNESS = 10.0
"""A past token's vote is exp(SHARPNESS x cosine)."""
FADE, REACH = 0.85, 8
"""A vote counts the ``REACH`` tokens after it, the first 1, the next FADE, FADE^2, …"""
HALF_LIVES = (2, 8, 32)
"""Of the decayed means of router probabilities, in tokens; that of the choices has the last."""
FLOOR = 0.005
"""Below this multiple of a uniform share, how much less does not matter."""
SCORE_WEIGHTS, SCORE_BIAS = np.array([0.2, 0.2, -0.6, 0.5, 1.15], np.float32), -0.35
CHOICE_WEIGHTS, CHOICE_BIAS = np.array([0.08, 0.04, 0.1, 0.12, 0.5], np.float32), -0.4
"""Logistic regression of exp(-(tokens to the next use - 1) / PATIENCE) on log shares: three means of probabilities,
the mean of choices, the votes. Fitted on training prompts of the reference model; what one domain gives holds for the
others (``python -m foregate.analysis.eviction --fit``). The second line is for routing without scores."""
PATIENCE = 4.0
FOLLOWING = round(2 * PATIENCE)
"""Tokens that must follow for what is not used in them to count as not used: exp(-2) is little."""
JUDGED = 2 * FOLLOWING
"""Tokens by which advice is judged: what comes later counts as never, which must not favour lower odds."""


class _Past:
    """The routing of one layer so far: ``means`` [rates, E], and the window, newest row last."""

    def __init__(self, experts: int) -> None:
        self.length = min(MOST_TOKENS, max(REACH + 1, WINDOW // experts))
        self._shares = np.full((len(_RATES) + 1, experts), 1 / experts, np.float32)
        self.means = self._shares[:-1]  # the last row is for the votes
        self._keys = np.zeros((2 * self.length, experts), np.float32)
        self._after = np.zeros((2 * self.length, experts), np.float32)
        self._rows = 0
        self.scored = False
        self.advice: Advice | None = None
        self._native = self._bound()

    def _bound(self) -> EchoPast | None:
        return EchoPast(_RULES, self._shares, self._keys, self._after, _WEIGHED) if available() else None

    def widen(self, experts: int) -> None:
        """There are more experts than were known."""
        more = ((0, 0), (0, experts - self.means.shape[1]))
        self._shares, self._keys, self._after = (np.pad(old, more) for old in (self._shares, self._keys, self._after))
        self.means = self._shares[:-1]
        self._native = self._bound()

    def advise(self, advice: Floats, weights: Floats) -> None:
        """See ``Echo.advise``; until more is seen."""
        self.advice = advice.copy(), weights.copy()
        if self._native is not None:
            self._native.advise(advice, weights)

    def see(self, shares: Floats, choices: Floats, keys: Floats) -> None:
        """The newest tokens, [T, E] each: rows of ``shares`` and ``choices`` sum to 1, ``keys`` have norm 1."""
        kept = _KEPT ** np.arange(len(keys) - 1, -1, -1, dtype=np.float32)  # [rates, T]
        self.means *= kept[:, :1] * _KEPT
        self.means[:-1] += _RATES[:-1] * kept[:-1] @ shares
        self.means[-1] += _RATES[-1] * kept[-1] @ choices
        self._append(shares[-self.length :], keys[-self.length :])

    def see_one(self, shares: Floats, choices: Floats, key: Floats) -> None:
        """``see`` for one token, [E] each."""
        self._shares[:-1] *= _KEPT
        self._shares[:-2] += _SHARE_RATES * shares
        self._shares[-2] += _CHOICE_RATE * choices
        start = self._room(1)
        self._keys[start], self._after[start] = key, 0.0
        rows = min(REACH, start)
        self._after[start - rows : start] += _FADES[REACH - rows :] * shares

    def see_compiled(self, chosen: NDArray[np.int64], scores: Floats | None, *, logits: bool) -> int | None:
        """A token of [k] experts, by what its router said [E], in one call: see ``EchoPast.see``. None without it."""
        if self._native is None:
            return None
        code = self._native.see(self._room(1), chosen, scores, logits=logits)
        if code != SEEN:
            self._rows -= 1
        return code

    def features(self) -> Floats:
        """Log shares, in multiples of the uniform one: [5, E]."""
        self._shares[-1] = self._votes()
        logs: Floats = self._shares * self._shares.shape[1]
        logs += FLOOR
        return np.log(logs, out=logs)

    def worth(self) -> Floats:
        """log of the expected exp(-(tokens to the next use - 1) / PATIENCE), [E]: overwritten by the next call."""
        advice = self.advice if self.scored else None
        if self._native is not None:
            return self._native.worth(self._rows, int(self.scored) if advice is None else None)
        bias: Floats | float
        weights, bias = (SCORE_WEIGHTS, SCORE_BIAS) if self.scored else (CHOICE_WEIGHTS, CHOICE_BIAS)
        if advice is not None:
            bias, weights = advice
        worth: Floats = weights @ self.features()
        worth += bias
        np.exp(np.negative(worth, out=worth), out=worth)
        return np.negative(np.log1p(worth, out=worth), out=worth)

    def _votes(self) -> Floats:
        """What is needed after a token routed like the newest one, [E]; sums to 1 or a little less."""
        last = self._rows - 1
        first = max(0, last - self.length)
        if first == last:
            first_guess: Floats = self.means[0]
            return first_guess
        vote = self._keys[first:last] @ self._keys[last]
        vote -= 1.0
        vote *= SHARPNESS
        np.exp(vote, out=vote)
        found: Floats = vote @ self._after[first:last]
        found /= np.add.reduce(vote) * _FADES_TOTAL
        return found

    def _room(self, tokens: int) -> int:
        """The first of ``tokens`` new rows of the window."""
        if self._rows + tokens > len(self._keys):
            kept = slice(max(0, self._rows - self.length), self._rows)
            self._rows = kept.stop - kept.start
            self._keys[: self._rows], self._after[: self._rows] = self._keys[kept].copy(), self._after[kept].copy()
        self._rows += tokens
        return self._rows - tokens

    def _append(self, shares: Floats, keys: Floats) -> None:
        tokens = len(keys)
        start = self._room(tokens)
        self._keys[start : self._rows], self._after[start : self._rows] = keys, 0.0
        for ago in range(REACH):  # token t is in the future of row start + t - 1 - ago
            skip = max(0, 1 + ago - start)
            if skip >= tokens:
                break
            self._after[start - 1 - ago + skip : self._rows - 1 - ago] += FADE**ago * shares[skip:]


class Echo:
    """Evicts the expert with the lowest expected exp(-(time to its next use) / PATIENCE), in tokens.

    The time has two parts: how far the layer itself is (the one that has just run comes again last), and how likely
    its router is to choose the expert then and soon after. ``observe`` tells all it can use. Where nobody calls it,
    choices are taken from the accesses, and router scores are not known. Nothing is reset when an expert is evicted.
    Ties go to the lower layer, then the lower expert. Memory: up to 1 MiB a layer. Advice is taken as long as it
    does not turn out to be worse than what the policy knows by itself (``experts.trust``).
    """

    def __init__(self) -> None:
        self._pasts: dict[int, _Past] = {}
        self._worth = np.zeros((0, 0), np.float32)
        self._held = np.zeros((0, 0), np.bool_)
        self._away = _away(0)
        self._lowest: Lowest | None = None
        self._stale: set[int] = set()
        self._layer = -1
        self._touched: dict[int, None] = {}
        self._observed = False
        self._logits = False
        self._trust = Trust(PATIENCE, JUDGED)
        self._advised = False

    def observe(self, layer: int, experts: NDArray[np.int64], scores: Floats | None = None) -> None:
        """See ``interfaces.RoutingAware``."""
        self._observed = True
        self._layer = layer
        self._trust.saw(layer, experts)
        past = self._pasts.get(layer) if len(experts) == 1 else None
        if past is not None:
            past.advice = None
        if past is not None and self._see_compiled(past, experts[0], scores):
            self._stale.add(layer)
            return
        if scores is not None and not math.isfinite(np.add.reduce(scores, axis=None)):
            scores = None  # a router that masks
        self._see(layer, experts, scores)

    def _see_compiled(self, past: _Past, chosen: NDArray[np.int64], scores: Floats | None) -> bool:
        """Whether one token more, of as many experts as ``past`` knows, went the short way."""
        known = past.means.shape[1]
        if scores is None:
            row, suits = None, int(chosen.max(initial=0)) < known
        else:
            row, suits = scores[0], scores.shape[1] == known
        if not suits or len(chosen) > MOST_CHOSEN:
            return False
        code = past.see_compiled(chosen, row, logits=self._logits)
        if code == NEGATIVE:
            self._logits = True
            code = past.see_compiled(chosen, row, logits=True)
        if code == SEEN:
            past.scored = row is not None
        return code == SEEN

    def advise(self, layer: int, advice: Floats, weights: Floats) -> None:
        """See ``interfaces.Advised``. Used where the router's scores were told, with which advice is trained."""
        past = self._pasts[layer]
        known = past.means.shape[1]
        advice, weights = np.asarray(advice, np.float32), np.asarray(weights, np.float32)
        if advice.ndim != 1 or len(advice) < known or weights.shape != SCORE_WEIGHTS.shape:
            raise ConfigError(f"advice {advice.shape} by {weights.shape} on {known} experts of MoE layer {layer}")
        if not math.isfinite(np.add.reduce(advice) + np.add.reduce(weights)):
            raise ConfigError(f"advice on MoE layer {layer} that is not finite")
        if past.scored and self._trust.wants(layer, len(self._pasts)):
            features = past.features()
            self._trust.begin(layer, SCORE_WEIGHTS @ features + SCORE_BIAS, weights @ features + advice[:known])
        if self._trust.given:
            past.advise(advice[:known], weights)
            self._stale.add(layer)
            self._advised |= past.scored

    def wants_advice(self, layer: int) -> bool:
        """See ``interfaces.Advised``."""
        return self._pasts[layer].scored and (self._trust.given or self._trust.wants(layer, len(self._pasts)))

    def takes_advice(self) -> bool:
        """See ``interfaces.Advised``."""
        return self._advised and self._trust.given

    def touch(self, key: ExpertKey) -> None:
        layer, expert = key
        if not self._observed and (layer != self._layer or expert in self._touched):
            self._close()
            self._layer = layer
        if layer >= len(self._held) or expert >= self._held.shape[1]:
            self._fit(layer, expert + 1)
        self._held[layer, expert] = True
        if not self._observed:
            self._touched[expert] = None

    def victim(self, candidates: Collection[ExpertKey]) -> ExpertKey:
        """Raises IntegrityError if no candidate was ever touched."""
        for layer in self._stale:
            past = self._pasts[layer]
            self._worth[layer, : past.means.shape[1]] = past.worth()
        self._stale.clear()
        layers, width = self._worth.shape
        flat, best = self._compared()
        for _ in range(_TRIES):
            if best < 0 or flat[best] == _NEVER:
                break
            key = ExpertKey(*divmod(best, width))
            if key in candidates:
                return key
            flat[best] = _NEVER
            best = int(flat.argmin())
        left = [key for key in candidates if key.layer < layers and key.expert < width and self._held[key]]
        if not left:
            raise IntegrityError(f"none of {len(candidates)} candidates was ever touched")
        return min(left, key=lambda key: (flat[key.layer * width + key.expert], key))

    def _compared(self) -> tuple[Floats, int]:
        """``worth`` by how soon a layer runs, [L E], infinite where nothing is held; where the lowest is, or -1."""
        if self._lowest is not None:
            return self._lowest.left.ravel(), self._lowest(self._layer)
        away = self._away[self._layer, :, None] if len(self._away) else np.float32(0)
        flat: Floats = np.where(self._held, self._worth - away, _NEVER).ravel()
        return flat, int(flat.argmin()) if flat.size else -1

    def worth(self, layer: int) -> Floats:
        """What ``observe`` has taught about the experts of ``layer``: larger is needed sooner, [E]."""
        return self._pasts[layer].worth().copy()

    def tell(self, layer: int, worth: Floats) -> None:
        """In place of ``observe``: the ``worth`` of one that observed the same. For replays through many caches."""
        self._observed = True
        self._layer = layer
        self._fit(layer, len(worth))
        self._worth[layer, : len(worth)] = worth

    def features(self, layer: int) -> Floats:
        """What the weights weigh, for every expert of ``layer``, which has been observed: [5, E]."""
        return self._pasts[layer].features()

    def forget(self, key: ExpertKey) -> None:
        if key.layer < len(self._held) and key.expert < self._held.shape[1]:
            self._held[key] = False

    def _close(self) -> None:
        """The accesses of one layer have ended: they are its choice."""
        if self._touched:
            self._see(self._layer, np.array([list(self._touched)], np.int64), None)
            self._touched.clear()

    def _see(self, layer: int, experts: NDArray[np.int64], scores: Floats | None) -> None:
        past = self._pasts.get(layer)
        width = 0 if past is None else past.means.shape[1]
        if scores is not None and scores.shape[1] < width:
            scores = None  # not of all its experts
        width = max(width, int(experts.max(initial=0)) + 1 if scores is None else scores.shape[1])
        past = self._make(layer, past, width)
        past.scored, past.advice = scores is not None, None
        self._stale.add(layer)
        if len(experts) == 1:
            self._see_one(past, experts[0], None if scores is None else scores[0])
            return
        choices = _hot(experts[-MOST_TOKENS:], width)
        shares, raw = choices, choices
        if scores is not None:
            raw = scores[-MOST_TOKENS:].astype(np.float32, copy=False)
            self._logits = self._logits or bool(raw.min() < 0)
            shares = _softmax(raw) if self._logits else raw / np.maximum(raw.sum(axis=1, keepdims=True), 1e-9)
        past.see(shares, choices, _unit(raw))

    def _see_one(self, past: _Past, chosen: NDArray[np.int64], scores: Floats | None) -> None:
        """``_see`` for one token, without the axis and the temporaries of many: the same values, bit for bit."""
        width = past.means.shape[1]
        choices = _hot_one(chosen, width)
        shares = raw = choices
        if scores is not None:
            raw = scores.astype(np.float32, copy=False)
            self._logits = self._logits or bool(np.minimum.reduce(raw) < 0)
            if self._logits:
                shares = raw - np.maximum.reduce(raw)
                np.exp(shares, out=shares)
                shares /= np.add.reduce(shares)
            else:
                shares = raw / max(np.add.reduce(raw), _LEAST)
        key = raw - np.add.reduce(raw) / width
        key /= np.sqrt(np.add.reduce(key * key)) + _LEAST
        past.see_one(shares, choices, key)

    def _make(self, layer: int, past: _Past | None, width: int) -> _Past:
        """The past of ``layer``, with room for ``width`` experts everywhere."""
        self._fit(layer, width)
        if past is None:
            past = self._pasts[layer] = _Past(width)
        elif past.means.shape[1] < width:
            past.widen(width)
        return past

    def _fit(self, layer: int, experts: int) -> None:
        """Make room for a layer and its experts; what is known stays."""
        layers, width = self._held.shape
        wanted = max(layers, layer + 1), max(width, experts)
        if wanted != (layers, width):
            grow = ((0, wanted[0] - layers), (0, wanted[1] - width))
            self._held, self._worth = np.pad(self._held, grow), np.pad(self._worth, grow)
            self._away = _away(wanted[0])
            self._lowest = Lowest(self._worth, self._held, self._away) if available() else None


_RATES = np.array([1 - 0.5 ** (1 / half) for half in (*HALF_LIVES, HALF_LIVES[-1])], np.float32)[:, None]
_FADES = np.array([[FADE**ago] for ago in range(REACH - 1, -1, -1)], np.float32)
_KEPT = 1 - _RATES
_SHARE_RATES, _CHOICE_RATE = _RATES[:-1], _RATES[-1]
_FADES_TOTAL = _FADES.sum()
_WEIGHED = [np.append(CHOICE_WEIGHTS, np.float32(CHOICE_BIAS)), np.append(SCORE_WEIGHTS, np.float32(SCORE_BIAS))]
_LEAST, _NEVER = np.float32(1e-9), np.float32(np.inf)
_RULES = EchoRules(
    tuple(_RATES[:, 0].tolist()), tuple(_FADES[:, 0].tolist()), _FADES_TOTAL, SHARPNESS, FLOOR, float(_LEAST)
)
_TRIES = 16
"""Lowest keys looked at one by one; past them the pinned are many, as in prefill, and the candidates are walked."""


def _hot(experts: NDArray[np.int64], width: int) -> Floats:
    """[T, k] → [T, E]: equal shares of the chosen."""
    out = np.zeros((len(experts), width + 1), np.float32)  # the last column takes the padding
    out[np.arange(len(experts))[:, None], np.minimum(experts, width)] = 1.0  # -1 is the last column, too
    out = out[:, :width]
    out /= np.maximum(out.sum(axis=1, keepdims=True), 1.0)
    return out


def _hot_one(chosen: NDArray[np.int64], width: int) -> Floats:
    """``_hot`` of one token: [k] → [E]."""
    out = np.zeros(width, np.float32)
    ids = {expert for expert in chosen.tolist() if 0 <= expert < width}
    if ids:
        share = 1 / len(ids)
        for expert in ids:
            out[expert] = share
    return out


def _away(layers: int) -> Floats:
    """How far each layer is when the first index has just run, in units of ``worth``: [L, L]."""
    there = (np.arange(layers)[None] - np.arange(layers)[:, None] - 1) % max(1, layers)
    found: Floats = (there / (PATIENCE * max(1, layers))).astype(np.float32)
    return found


def _softmax(logits: Floats) -> Floats:
    out: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    out /= out.sum(axis=1, keepdims=True)
    return out


def _unit(rows: Floats) -> Floats:
    """Rows without their mean, of norm 1."""
    out: Floats = rows - rows.sum(axis=1, keepdims=True) / rows.shape[1]
    out /= np.sqrt((out * out).sum(axis=1, keepdims=True)) + 1e-9
    return out
