"""The codebooks of ggml's IQ types: points of a lattice, which blocks name by their number.

Format: ggml-common.h (iq1s_grid, iq2xxs_grid, …, kvalues_iq4nl). A grid's points have eight (IQ1, IQ2) or four (IQ3)
coordinates out of a few levels, and are numbered in ascending order of their coordinates, the last one first. A grid
is therefore the set of its points, and that is how it is kept here: one bit for each point of the lattice, deflated,
in base 85.
"""

from __future__ import annotations

import base64
import functools
import zlib
from collections.abc import Callable

import numpy as np

from aphrodite.quantization.types import QuantType

_IQ1_LEVELS = (-1, 0, 1)
_IQ2_LEVELS = (0x08, 0x19, 0x2B)
_IQ3_XXS_LEVELS = (0x04, 0x0C, 0x14, 0x1C, 0x24, 0x2C, 0x34, 0x3E)
_IQ3_S_LEVELS = (1, 3, 5, 7, 9, 11, 13, 15)

_IQ1_S = (
    "c-k#eK}(!R7=CxE;dM-9V?RN1diSfb(^(PgE$L;EU0C#DLh=VZ*|bQ>IZZw%yXlwN6ha`hG?#HO$v6$G@ldv(umMk2dT8mb2WdTox*h^v8Vt"
    "nDuD#8?@Vw9Syw7v(LR2?w<}y}3b9YJG^C&5*&qs>Nl?x;NhAB!%0hRecnsm$a2YwJ@;QqccSPG~@n#@N5uBY$^gNY22s7}?HYgoxmY#Y+!A"
    "jh1yxWA4l1OzVO1-XRyWBes^wA;LAoBq<x!%nuPhFWp9`{&R@7DG%<XIwD^Is3Q$Jf@<B<<hd(0^?jzIHG8vQn*?-$Ub(LsHW&@kYNcQ%|}d"
    "P%c;av8KJU^mWiJv*28-WD<$YEG%#}+D!ES;XeDuFD(VlG#i@A4$V;H%7rH52w&LB_pg1xSvl=L<CZ@9?{WdkSxbxSuMq|l64F4MqT|O(RS}"
    "O@H(bLXvHn!_OntvSw2GXTKiD_6XGLxujp0!)qyF+V=7Bv?g3oFy??D1-6?{(2le%HQrc>Le(m#@Cb_P%)g$;r#{<KcsUbe#9?p_<1{H>jE?"
    "+1SCIq;Fwj@yPMjA_U90?}vdY$)D1%>fQq-z{36HBT$I&mG*v%J#A~V%aSj@pZtCEAg}V1eou`2@uUxU_YQ=)6;l3U7EjmAKr#y2F0kdO91c"
    "}@u6ikZ68>90+)KINV7E3oVy0wcNC7Qg*Gnz$6Ckekcj5w;yQl$8BcV}uIeIA*;9XR~L2uzcrHYS+2)y-rqrtcg6e{stpn$cM#il(dTBx(R&"
    "0u-;P1DmAvG}u@dX;b%ns9v~6p49X^c}lqEMlIFjzJBbrp$X4T{{D_p5YV7e^~xM<^E7<_56qcAaL=FI+lT|4v2#Y&dpW2-Egd@Fdf5G@Dhe"
    "eu*|v(bMFD;1sQ1"
)
_IQ2_XXS = (
    "c-nPRORB^$43oj#tB`je2YP^R=KfcCw)5@K5e=lV<VbEmf91ogR%p3E0BR^O#16P=^@J3)+t0mx___f>P^zDolEn6;is&dxI!#Zg_{KuzkVd"
    "4Mw`?l*l~*(z5~c8Qj-!-YZym34v`$TQ4<4*~)dpL;rq|+W4irx`d$&)6^vGb7UkLBrzcFbHqcf>sMFwRxr;MTG;*}m%Qlby-@@TSk)X7om@"
    "@#uKQIjUUWQ&$2&y}*gX5TV=Bc|Cuh1wL(2Kn3A3Yj<N%;gblzhT7_jxp@MF=lA5st5R^Hl2J=^JV`E{Z0D^#$6R7"
)
_IQ2_XS = (
    "c-mc2TdsvL2pkgnkBRPwCicH3cK=&BJX-bM<{ZTW!^|+oxJIi-qkD|rsuaR~iB<*?x~C4>8J0pJW<V>X*vo#SY&(-c)w(<-fCU6QVt|)*=>o"
    "J=N8h~B3mmYKBw*Y)Ca<s*uvOak7T*la5<g=kAh?T96(5+bR(Mt@J=L5^n!u1sF+~=p=RjVCGbM+vDH*59tF!>kC`)-u3GzO}jM8X_r-*1yt"
    "ubG*&a^iqGs?p-do}D8x2NWXU?%O)=7t88q040RdJ=Ak)9T+$YBcFD31^6BC_W+mG1}iEA-T}Oj@u6-pQ1yByIl9%`W3mW#F%j~<yh(N0zSL"
    "~oH^Zy%}}tQx4=M73#xoc?jNErTmD?iDs40;(&MG>YYMNuDE=SK;cc#9vM%q_=>7msuqjC"
)
_IQ2_S = (
    "c-n1JU5W-F3~NE(E9iYHjPDBe{#V(wI=kPpE5rQ7#3X8F%Z9aF@G^(h-0EI3Em0|W3^QwctZ7zp0a8G#rYWS&oF&YfEj@sgh^u5FBBgC>LAk"
    "BEEtarKv-X}c)kMD5E9g)N*35uFS6j&;COQ!QC2=T0oAzp}=fs8f?3xctXeG?g^dQAA!2(KVP=j1x!<Qgx@l7F)Pu!TMd$m>{ZzEray(N$Az"
    "Rb24)#*U9zYZZF^+2!@EVQ9?ARiEH!J<ErE8usn4?()-BQhW*1pE<<S|Z6aT82aQO}QP4+el6zUY~*z7~Sl6pK?p!Q_DMIhH4w7?joIO9P^#"
    "Dw9CRS7mu8OBC|vDii4FoWN_zK9m?6y$}qXC*pyH_2f!)+bXep&HXz~CYasM7Fd3(JhmM~KIbkHJ7yU4;E692~{FNElHOf~Fzm+TBn!W(Jyj"
    "C6"
)
_IQ3_XXS = (
    "c-l=-F%H5o3_M%0RAmZ7_lgPeigaLyA4Q!IuVCbv_?)J2Rn;aw-<^~BWtxCXwzFx0%xW)eST<YW5KL&L;j#hAAHoX-c)&}FY<X@1m|7IGsjr"
    "X>q7@bAuHrcP3L2_`6x)_>^v5;&o?@Fdagv_Uo9H*utGOGEJ93R6P|L2rgx{U}Y-UnrS3sKYtPIbF!WdDS7|dsT<9UQCqzhJe8+4kK5km%Xv"
    "Hjm=J(sMgqk-e3v^zjTJayVggoDWMJzTWE4a0T)3l-9P!ydlNePrBA?Xny*@kmBo4W|8$?wEo20v5Uy_5"
)
_IQ3_S = (
    "c-k#d!AiqG5PdVu!e&pqA>uXNMyUCUt<-~hDT4SrX{pfmmf{D9Rs{Q#&TgE;z`Qr}-rMBob#A|%IbF{W(Id*&Lkwq!%0~0(%@Ao{OU0lD_x2"
    "OXCI^OquXIKLt}o^pYnG?L6&oz+9HeSVPSrN(A}t!YmF^Xmp*3Qy-5G8(e|b5Y-VC?q(AA>+32wuC)HmEXp@c1}PT|h83}iuXSwt^ePGkv?U"
    "+Lf3a_=1ov?9@{igP&9v4ypFswx3&TJZ@M2_=SuX>*z&qp%+CoXl)ge8!drA@5Agyn!FG+()?*sDei}n1QT95(J|p-wR7#Aht{0!Hx!aZfy;"
    "cl!bD4D3uqR(zW`GY5;6>@R{_|3X$jRqNR^eu)^e<Ll^vCYlKPU1;QQ+o$IB(hKom+bHx0SXmXXwyZnVo8~6jd#wQ>"
)

_WORD_SHIFTS = {8: np.array([0, 2, 8, 10, 4, 6, 12, 14], np.uint16), 4: np.array([0, 4, 8, 12], np.uint16)}

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""What the sixteen codes of IQ4_NL and IQ4_XS stand for."""

MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""Twice what the sixteen codes of FP4 (e2m1) stand for; ggml's code 8 is plain zero."""


@functools.cache
def iq1_grid() -> np.ndarray:
    """Of IQ1_S and IQ1_M, float32 `[2048, 8]`."""
    return _points(_IQ1_S, _IQ1_LEVELS, 8)


@functools.cache
def iq2_xxs_grid() -> np.ndarray:
    """float32 `[256, 8]`."""
    return _points(_IQ2_XXS, _IQ2_LEVELS, 8)


@functools.cache
def iq2_xs_grid() -> np.ndarray:
    """float32 `[512, 8]`."""
    return _points(_IQ2_XS, _IQ2_LEVELS, 8)


@functools.cache
def iq2_s_grid() -> np.ndarray:
    """float32 `[1024, 8]`."""
    return _points(_IQ2_S, _IQ2_LEVELS, 8)


@functools.cache
def iq3_xxs_grid() -> np.ndarray:
    """float32 `[256, 4]`."""
    return _points(_IQ3_XXS, _IQ3_XXS_LEVELS, 4)


@functools.cache
def iq3_s_grid() -> np.ndarray:
    """float32 `[512, 4]`."""
    return _points(_IQ3_S, _IQ3_S_LEVELS, 4)


@functools.cache
def signs() -> np.ndarray:
    """Eight signs for each byte, lowest bit first: float32 `[256, 8]` of 1 and -1."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (1.0 - 2.0 * bits).astype(np.float32)


@functools.cache
def even_signs() -> np.ndarray:
    """Eight signs for each number below 128, the last one such that an even number is negative: float32 `[128, 8]`."""
    chosen = np.arange(128, dtype=np.uint8)
    parity = np.bitwise_count(chosen) & np.uint8(1)
    table: np.ndarray = signs()[chosen | parity << np.uint8(7)]
    return table


@functools.cache
def grid_words(qtype: QuantType) -> np.ndarray | None:
    """The type's grid with its levels numbered, a word a point: uint16 `[points]`; None for a type that has none.

    A coordinate of eight is two bits, in the order 0, 1, 4, 5, 2, 3, 6, 7 from the low end; one of four is four bits.
    """
    found = _GRIDS.get(qtype)
    if found is None:
        return None
    grid, levels = found[0](), np.array(found[1], np.float32)
    shifts = _WORD_SHIFTS[grid.shape[1]]
    words: np.ndarray = np.bitwise_or.reduce(np.searchsorted(levels, grid).astype(np.uint16) << shifts, axis=1)
    return words


def _points(packed: str, levels: tuple[int, ...], dimensions: int) -> np.ndarray:
    members = np.frombuffer(zlib.decompress(base64.b85decode(packed)), np.uint8)
    numbers = np.flatnonzero(np.unpackbits(members, bitorder="little"))
    coordinates = numbers[:, None] // len(levels) ** np.arange(dimensions) % len(levels)
    points: np.ndarray = np.array(levels, np.float32)[coordinates]
    return points


_GRIDS: dict[QuantType, tuple[Callable[[], np.ndarray], tuple[int, ...]]] = {
    QuantType.IQ1_S: (iq1_grid, _IQ1_LEVELS),
    QuantType.IQ1_M: (iq1_grid, _IQ1_LEVELS),
    QuantType.IQ2_XXS: (iq2_xxs_grid, _IQ2_LEVELS),
    QuantType.IQ2_XS: (iq2_xs_grid, _IQ2_LEVELS),
    QuantType.IQ2_S: (iq2_s_grid, _IQ2_LEVELS),
    QuantType.IQ3_XXS: (iq3_xxs_grid, _IQ3_XXS_LEVELS),
    QuantType.IQ3_S: (iq3_s_grid, _IQ3_S_LEVELS),
}
