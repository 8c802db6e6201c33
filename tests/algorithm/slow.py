"""The slow twins: the same mathematics in plain Python and numpy, one number at a time."""

from __future__ import annotations

import math

import numpy as np

MASK = 0xFFFFFFFF


def mix(x: int) -> int:
    """The 'lowbias32' hash, from its published description."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def random_word(key: tuple[int, int], position: int, token: int) -> int:
    low, high = key[0] & MASK, key[1] & MASK
    a = mix(mix((position + low) & MASK) ^ high)
    b = mix((mix(position ^ high) + low) & MASK)
    return mix((mix(((token * 0x9E3779B9) & MASK) ^ a) + b) & MASK)


def gumbel(key: tuple[int, int], position: int, token: int) -> float:
    u = (random_word(key, position, token) + 0.5) / 2**32
    return -math.log(-math.log1p(-min(u, 1 - 2**-24)))


def warp(logits: np.ndarray, prompt: list[int], answer: list[int], settings: dict) -> np.ndarray:
    """One distribution. ``answer`` is everything after the prompt, in order."""
    z = logits.astype(np.float64).copy()
    size = len(z)
    for v in range(size):
        if settings["bias"] is not None:
            z[v] += settings["bias"][v]
    for v in set(prompt) | set(answer):
        z[v] = z[v] / settings["repetition"] if z[v] > 0 else z[v] * settings["repetition"]
    for v in set(answer):
        z[v] -= settings["presence"] + answer.count(v) * settings["frequency"]
    if settings["temperature"] > 0:
        z = z / settings["temperature"]
    if settings["top_k"]:
        kth = sorted(z, reverse=True)[min(settings["top_k"], size) - 1]
        z = np.where(z < kth, -np.inf, z)
    order = sorted(range(size), key=lambda v: -z[v])
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    kept, mass = set(), 0.0
    for v in order:
        if settings["top_p"] == 1 or mass < settings["top_p"] or not kept:
            kept.add(v)
        mass += p[v]
    z = np.array([z[v] if v in kept else -np.inf for v in range(size)])
    if settings["min_p"] > 0:
        z = np.where(z < z.max() + math.log(settings["min_p"]), -np.inf, z)
    return z


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max())
    return p / p.sum()
