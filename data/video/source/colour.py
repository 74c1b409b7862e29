"""What the colours of a frame mean, and how they become those of an SDR BT.709 screen.

**Untagged** colours are read as players do: BT.709 for HD sizes, BT.601 below.

**HDR** (PQ, HLG) and wide gamuts (BT.2020, P3) are mapped by one fixed curve, whatever a file says
of its mastering, so that the same scene always comes out the same:

1. to light: PQ by SMPTE ST 2084; HLG by BT.2100 with its system gamma 1.2 on 1000 nits; SDR as the
   power 2.4 of BT.1886. 1.0 is the reference white of BT.2408, 203 nits.
2. to BT.709 primaries; what lies outside is clipped.
3. HDR only: up to KNEE nothing changes, beyond it a shoulder that reaches 1.0 at 1000 nits, where
   it clips. It is taken of the largest channel and scales all three, so that hues stay. Reference
   white comes out as 244 of 255, a mid grey and skin as they were.
4. back by the power 1/2.4.
"""

from __future__ import annotations

from functools import lru_cache

import av
import numpy as np

BT709, BT601 = 1, 6  # of H.273, matrix coefficients
MATRICES = {1, 4, 5, 6, 7, 9}  # that FFmpeg converts from: BT.709, FCC, BT.601, SMPTE 240M, BT.2020
TRANSFERS = {16: "pq", 18: "hlg"}  # of H.273
PRIMARIES = {9: "bt2020", 11: "p3", 12: "p3"}  # those that are wider than BT.709's
CHROMATICITIES = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
D65 = (0.3127, 0.3290)
WHITE, PEAK = 203.0, 1000.0  # nits
KNEE = 0.8  # of reference white
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020
LEVELS = 4096  # of the tables: more than the 10 or 12 bits of a video
ROWS = 16


def usual_matrix(width: int, height: int) -> int:
    """What players take untagged colours for: BT.709 for HD, BT.601 below."""
    return BT709 if width >= 1280 or height > 576 else BT601


def is_tagged(frame: av.VideoFrame) -> bool:
    """Whether the frame says by which matrix its colours are made."""
    rgb = frame.format.is_rgb or frame.format.name.startswith(("gray", "pal"))
    return bool(rgb or frame.colorspace in MATRICES)


def mapping(frame: av.VideoFrame) -> tuple[str, str] | None:
    """(transfer, primaries) of a frame that has to be mapped; None for BT.709 and BT.601."""
    transfer = TRANSFERS.get(frame.color_trc, "sdr")
    primaries = PRIMARIES.get(frame.color_primaries)
    if transfer != "sdr" and frame.color_primaries not in (1, 5, 6):
        return transfer, primaries or "bt2020"
    if primaries or transfer != "sdr":
        return transfer, primaries or "bt709"
    return None


def to_screen(picture: np.ndarray, transfer: str, primaries: str) -> np.ndarray:
    """The curve above: uint16 RGB `[height, width, 3]` over its whole range, to uint8 BT.709."""
    out = np.empty(picture.shape, np.uint8)
    for top in range(0, len(picture), ROWS):  # a few rows at a time stay in the processor's cache
        out[top : top + ROWS] = _rows_to_screen(picture[top : top + ROWS], transfer, primaries)
    return out


def _rows_to_screen(picture: np.ndarray, transfer: str, primaries: str) -> np.ndarray:
    light = _to_light(transfer)[picture >> 4].reshape(-1, 3)
    if transfer == "hlg":
        luminance = np.maximum(light @ LUMINANCE, 1e-6)
        light *= (luminance**0.2 * (PEAK / WHITE))[:, None]
    light = np.maximum(light @ _to_bt709(primaries), 0)
    if transfer != "sdr":
        largest = np.maximum(np.maximum(light[:, 0], light[:, 1]), light[:, 2])
        light *= (_shoulder(largest) / np.maximum(largest, 1e-6))[:, None]
    # By the square root, which spaces the places of the table about as the eye does.
    places = np.sqrt(np.minimum(light, 1)) * (LEVELS - 1) + 0.5
    return _from_light()[places.astype(np.uint16)].reshape(picture.shape)


@lru_cache
def _to_light(transfer: str) -> np.ndarray:
    """Light at each level of a signal, float32, 1.0 at reference white; of HLG the scene's."""
    signal = np.arange(LEVELS) / (LEVELS - 1)
    if transfer == "pq":
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        power = signal ** (1 / m2)
        light = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * (10_000 / WHITE)
    elif transfer == "hlg":
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = signal**2.4
    return light.astype(np.float32)


@lru_cache
def _from_light() -> np.ndarray:
    """uint8 signal at each of LEVELS square roots of light."""
    light = (np.arange(LEVELS) / (LEVELS - 1)) ** 2
    return np.round(255 * light ** (1 / 2.4)).astype(np.uint8)


def _shoulder(light: np.ndarray) -> np.ndarray:
    """Identity below KNEE; beyond it Reinhard's curve with slope 1 at KNEE and 1.0 at PEAK."""
    over = np.maximum((light - KNEE) / (1 - KNEE), 0)
    top = (PEAK / WHITE - KNEE) / (1 - KNEE)
    bent = KNEE + (1 - KNEE) * over * (1 + over / top**2) / (1 + over)
    return np.where(light < KNEE, light, bent)


@lru_cache
def _to_bt709(primaries: str) -> np.ndarray:
    """float32 `[3, 3]`, to be multiplied from the right."""
    return (np.linalg.inv(_to_xyz("bt709")) @ _to_xyz(primaries)).T.astype(np.float32)


def _to_xyz(primaries: str) -> np.ndarray:
    """Linear RGB to CIE XYZ with white at D65 (SMPTE RP 177)."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in CHROMATICITIES[primaries]]).T
    x, y = D65
    white = np.array([x / y, 1.0, (1 - x - y) / y])
    return columns * np.linalg.solve(columns, white)
