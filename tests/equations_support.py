"""Cells that are defined by their equations: torch's own, and some that torch has not."""

from fused_rnn import cell
from fused_rnn.cells import mgu, relu, sigmoid, tanh


@cell(gates="h")
def rnn(x, W, h):
    return tanh(x.h + W.h(h))


# The same with another name of the gate: what the backward reads is the output.
@cell(gates="n")
def rnn_of_n(x, W, h):
    return tanh(x.n + W.n(h))


@cell(gates="h")
def rnn_relu(x, W, h):
    return relu(x.h + W.h(h))


@cell(gates="i f g o", states="h c")
def lstm(x, W, h, c):
    i = sigmoid(x.i + W.i(h))
    f = sigmoid(x.f + W.f(h))
    g = tanh(x.g + W.g(h))
    o = sigmoid(x.o + W.o(h))
    c = f * c + i * g
    return o * tanh(c), c


@cell(gates="r z n")
def gru(x, W, h):
    r = sigmoid(x.r + W.r(h))
    z = sigmoid(x.z + W.z(h))
    n = tanh(x.n + r * W.n(h))
    return (1 - z) * n + z * h


# The input gate is what the forget gate leaves (Greff et al. 2017).
@cell(gates="f g o", states="h c")
def coupled(x, W, h, c):
    f = sigmoid(W.f(h) + x.f)
    g = tanh(x.g + W.g(h))
    c = f * c + (1 - f) * g
    return sigmoid(x.o + W.o(h)) * tanh(c), c


# A leaky integrator: h passes beside the product.
@cell(gates="n")
def leaky(x, W, h):
    return 0.9 * h + 0.1 * tanh(x.n + W.n(h))


# A gate whose sum is used twice, so that the sum itself is kept; and a division.
@cell(gates="s g")
def swish(x, W, h):
    s = x.s + W.s(h)
    g = x.g + W.g(h)
    return s * sigmoid(s) / (1 + g * g) - h / 4


# Both states are read beside the products, and h is no activation.
@cell(gates="a b", states="h m")
def memory(x, W, h, m):
    a = sigmoid(x.a + W.a(h))
    m = a * m + (1 - a) * h
    return -(m * relu(x.b + W.b(h))) + h / 2, m


# No activation at all: the derivative does not depend on the gate.
@cell(gates="g")
def linear(x, W, h):
    return x.g / 2 + W.g(h) / 2


# The last gate's shares go different ways.
@cell(gates="r n")
def split(x, W, h):
    r = sigmoid(x.r + W.r(h))
    return tanh(x.n) * r + relu(W.n(h)) * (1 - r)


# Activations of activations, and one value that two results share.
@cell(gates="a b c", states="h s")
def nested(x, W, h, s):
    a = tanh(sigmoid(x.a + W.a(h)) + s)
    b = sigmoid(tanh(x.b + W.b(h)) * a)
    c = relu(x.c + W.c(h)) - a
    return a * b, s * b + tanh(c)


# Two stages: the reset gate before the product.
@cell(gates="r z n")
def reset_before(x, W, h):
    r = sigmoid(x.r + W.r(h))
    z = sigmoid(x.z + W.z(h))
    n = tanh(x.n + W.n(r * h))
    return n + z * (h - n)


# Two later gates and a c, which the first stage makes; the second reads a sum and h, and the operand is no activation.
@cell(gates="i s o g", states="h c")
def deep(x, W, h, c):
    i = sigmoid(x.i + W.i(h))
    s = x.s + W.s(h)
    c = i * c + (1 - i) * tanh(s)
    m = s * i + h / 2
    o = sigmoid(x.o + W.o(m))
    g = relu(x.g + W.g(m))
    return o * tanh(c) + g * s - h / 4, c


# The c is made by the second stage, and the operand is a gate.
@cell(gates="a b", states="h c")
def late(x, W, h, c):
    a = tanh(x.a + W.a(h))
    b = sigmoid(x.b + W.b(a))
    c = a * c * b
    return c * a, c


OF_TORCH = {"RNN": rnn, "LSTM": lstm, "GRU": gru}
CELLS = {each.__name__: each for each in (rnn, rnn_relu, lstm, gru, coupled, leaky, swish, memory, linear, split, nested)}
TWO_STAGES = {each.__name__: each for each in (reset_before, mgu, deep, late)}
CELLS |= TWO_STAGES
