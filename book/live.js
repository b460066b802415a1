// A network that trains in the reader's browser, and what is measured of it at every step. Runs as a worker, made by
// live.html from this text; the build puts both into the page.
//
//   f(x) = W₂ tanh(W₁x + b₁) + b₂,    ℓ(w) = mean over examples and classes of (f(x) − y)²
//
// w holds W₁, b₁, W₂, b₂ row by row, in the order of PyTorch. Matrices are Float64Arrays, one row per example or unit.
//
// Messages to the worker, each part optional:
//   digits                     the images: a line each, the label and 64 pixels from 0 to 16 as digits of base 17
//   rule, learningRate, rho    the rule "gd", "sam" or "momentum" and its settings, from the next step on
//   tolerance                  largest residual of λ_max that is accepted, relative to λ_max
//   seed, or weights           start again, from random weights or from these
//   steps                      how many more steps to take; 0 pauses, Infinity goes on
// It answers with { rows }: per step the loss, ‖g‖, λ_max and the edges, all at the weights before that step; and, when a
// message finds it at rest or brings it there, with { edges } of its last step: no rows follow.
"use strict";
const PIXELS = 64, HIDDEN = 32, CLASSES = 10, MOMENTUM = 0.9;
const EPSILON = 1e-5; // added to ‖g‖ in SAM's normaliser
const DIVERGED = 1e6; // a loss beyond any return; it starts near 0.3

// ---- vectors and matrices ----------------------------------------------------------------------------------------------

const dot = (a, b) => { let sum = 0; for (let i = 0; i < a.length; i++) sum += a[i] * b[i]; return sum; };
const norm = (a) => Math.sqrt(dot(a, a));
const plus = (a, scale, b) => a.map((value, i) => value + scale * b[i]);
const zeros = (size) => new Float64Array(size);

// X Wᵀ + b: a layer's output, for every example. Two outputs at a time, an even number, in two sums each: one sum alone
// would wait for itself.
function affine(X, W, b) {
  const outs = b.length, ins = W.length / outs, Z = zeros(X.length / ins * outs);
  for (let x = 0, z = 0; x < X.length; x += ins)
    for (let o = 0, w = 0; o < outs; o += 2, z += 2, w += 2 * ins) {
      const next = w + ins;
      let s0 = b[o], s1 = 0, t0 = b[o + 1], t1 = 0;
      for (let k = 0; k < ins; k += 2) {
        const x0 = X[x + k], x1 = X[x + k + 1];
        s0 += x0 * W[w + k];
        s1 += x1 * W[w + k + 1];
        t0 += x0 * W[next + k];
        t1 += x1 * W[next + k + 1];
      }
      Z[z] = s0 + s1;
      Z[z + 1] = t0 + t1;
    }
  return Z;
}

// D W: what comes back through a layer with `outs` outputs, an even number.
function back(D, W, outs) {
  const ins = W.length / outs, U = zeros(D.length / outs * ins);
  for (let d = 0, u = 0; d < D.length; u += ins)
    for (let o = 0, w = 0; o < outs; o += 2, d += 2, w += 2 * ins) {
      const d0 = D[d], d1 = D[d + 1];
      for (let k = 0; k < ins; k++) U[u + k] += d0 * W[w + k] + d1 * W[w + ins + k];
    }
  return U;
}

// W += Dᵀ X and b += the sum of D's rows: a layer's gradient, from D behind it and X before it. Four examples at a time.
function gather(D, X, W, b) {
  const outs = b.length, ins = W.length / outs;
  for (let d = 0, x = 0; d < D.length; d += 4 * outs, x += 4 * ins)
    for (let o = 0, w = 0; o < outs; o++, w += ins) {
      const d0 = D[d + o], d1 = D[d + outs + o], d2 = D[d + 2 * outs + o], d3 = D[d + 3 * outs + o];
      b[o] += d0 + d1 + (d2 + d3);
      for (let k = 0; k < ins; k++)
        W[w + k] += d0 * X[x + k] + d1 * X[x + ins + k] + (d2 * X[x + 2 * ins + k] + d3 * X[x + 3 * ins + k]);
    }
}

// ---- the loss and its derivatives --------------------------------------------------------------------------------------

const SIZES = [HIDDEN * PIXELS, HIDDEN, CLASSES * HIDDEN, CLASSES], SIZE = SIZES.reduce((a, b) => a + b);
function layers(w) {
  let end = 0;
  return SIZES.map((size) => w.subarray(end, end += size));
}

let X, Y; // images, mean image subtracted, and one-hot labels
function read(digits) {
  const lines = digits.trim().split("\n").map((line) => line.trim());
  X = zeros(lines.length * PIXELS);
  Y = zeros(lines.length * CLASSES);
  const mean = zeros(PIXELS);
  lines.forEach((line, i) => {
    Y[i * CLASSES + Number(line[0])] = 1;
    for (let k = 0; k < PIXELS; k++) mean[k] += X[i * PIXELS + k] = parseInt(line[k + 1], 17) / 16;
  });
  X = X.map((pixel, i) => pixel - mean[i % PIXELS] / lines.length);
}

// Loss and gradient at w, with what the products need. δ is ∂ℓ/∂f, u is ∂ℓ/∂h.
function lossAt(w) {
  const [W1, b1, W2, b2] = layers(w), gradient = zeros(SIZE), [gW1, gb1, gW2, gb2] = layers(gradient);
  const h = affine(X, W1, b1).map(Math.tanh);
  const error = affine(h, W2, b2).map((f, i) => f - Y[i]);
  const delta = error.map((e) => 2 * e / Y.length);
  const u = back(delta, W2, CLASSES);
  gather(delta, h, gW2, gb2);
  gather(u.map((u, i) => u * (1 - h[i] * h[i])), X, gW1, gb1);
  return { w, h, delta, u, loss: dot(error, error) / Y.length, gradient };
}

// H v exactly: the derivative R of every line of lossAt in the direction v (Pearlmutter 1994).
function product({ w, h, delta, u }, v) {
  const [, , W2, b2] = layers(w), [V1, a1, V2, a2] = layers(v), Hv = zeros(SIZE), [HW1, Hb1, HW2, Hb2] = layers(Hv);
  const Rh = affine(X, V1, a1).map((Rz, i) => Rz * (1 - h[i] * h[i]));
  const Rf = plus(affine(h, V2, a2), 1, affine(Rh, W2, zeros(CLASSES)));
  const Rdelta = Rf.map((r) => 2 * r / Y.length);
  const Ru = plus(back(Rdelta, W2, CLASSES), 1, back(delta, V2, CLASSES));
  gather(Rdelta, h, HW2, Hb2);
  gather(delta, Rh, HW2, zeros(CLASSES));
  gather(Ru.map((r, i) => r * (1 - h[i] * h[i]) - 2 * u[i] * h[i] * Rh[i]), X, HW1, Hb1);
  return Hv;
}

// ---- the rules: a step, and the edge beyond which it is unstable --------------------------------------------------------

const RULES = {
  gd: {
    step: ({ w, gradient }, { learningRate }) => plus(w, -learningRate, gradient),
    edge: (norm, { learningRate }) => 2 / learningRate,
  },
  sam: {
    step({ w, gradient }, { learningRate, rho }) {
      const uphill = plus(w, rho / (norm(gradient) + EPSILON), gradient);
      return plus(w, -learningRate, lossAt(uphill).gradient);
    },
    // (‖g‖/2ρ)·(√(1 + 8ρ/(η‖g‖)) − 1), in the form that cancels nowhere
    edge(norm, { learningRate, rho }) {
      const g = norm + EPSILON;
      return 4 / learningRate * Math.sqrt(g) / (Math.sqrt(g) + Math.sqrt(g + 8 * rho / learningRate));
    },
  },
  momentum: {
    step({ w, gradient }, { learningRate }) {
      velocity = plus(gradient, MOMENTUM, velocity);
      return plus(w, -learningRate, velocity);
    },
    edge: (norm, { learningRate }) => (2 + 2 * MOMENTUM) / learningRate,
  },
};

// ---- the sharpness -----------------------------------------------------------------------------------------------------

const KEPT = 3, MOST = 60; // Ritz vectors that the next step starts from; columns of the search space

// λ_max of a symmetric operator by Rayleigh–Ritz. The space starts with the Ritz vectors of the step before and grows by
// the top pair's residual until that is small: an eigenvalue lies within ‖Hx − θx‖ of θ, and far closer to it as a rule.
function sharpest(operator, start, tolerance) {
  const basis = [], images = [], T = [];
  const add = (vector) => {
    for (let pass = 0; pass < 2; pass++) for (const b of basis) vector = plus(vector, -dot(b, vector), b);
    const size = norm(vector);
    basis.push(vector.map((value) => value / size));
    images.push(operator(basis.at(-1)));
    T.push(basis.map((b) => dot(b, images.at(-1))));
  };
  const combine = (vectors, weights) => vectors.reduce((sum, v, i) => plus(sum, weights[i], v), zeros(SIZE));
  start.forEach(add);
  for (;;) {
    const pairs = eigenpairs(T), { value, vector } = pairs[0];
    const rest = plus(combine(images, vector), -value, combine(basis, vector)), residual = norm(rest);
    if (!(residual > tolerance * Math.abs(value)) || basis.length === MOST)
      return { value, residual, products: basis.length, vectors: pairs.slice(0, KEPT).map((p) => combine(basis, p.vector)) };
    add(rest);
  }
}

// All eigenpairs of a small symmetric matrix, given by its lower rows, largest first: Jacobi's rotations.
function eigenpairs(lower) {
  const n = lower.length, A = lower.map((_, i) => lower.map((_, j) => i < j ? lower[j][i] : lower[i][j]));
  const V = lower.map((_, i) => lower.map((_, j) => +(i === j)));
  const size = Math.hypot(...A.flat());
  for (let sweep = 0; sweep < 30; sweep++) {
    let off = 0;
    for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) {
      off = Math.max(off, Math.abs(A[p][q]));
      if (Math.abs(A[p][q]) <= 1e-16 * size) continue;
      const half = (A[q][q] - A[p][p]) / (2 * A[p][q]), t = (half < 0 ? -1 : 1) / (Math.abs(half) + Math.hypot(half, 1));
      const c = 1 / Math.hypot(t, 1), s = t * c;
      for (let k = 0; k < n; k++) [A[k][p], A[k][q]] = [c * A[k][p] - s * A[k][q], s * A[k][p] + c * A[k][q]];
      for (let k = 0; k < n; k++) [A[p][k], A[q][k]] = [c * A[p][k] - s * A[q][k], s * A[p][k] + c * A[q][k]];
      for (let k = 0; k < n; k++) [V[p][k], V[q][k]] = [c * V[p][k] - s * V[q][k], s * V[p][k] + c * V[q][k]];
    }
    if (off <= 1e-14 * size) break;
  }
  return V.map((vector, i) => ({ value: A[i][i], vector })).sort((a, b) => b.value - a.value);
}

// ---- random numbers that a seed decides ---------------------------------------------------------------------------------

// mulberry32, uniform in (0, 1); then Box and Muller's normal numbers, without those beyond two deviations.
let state = 0;
function uniform() {
  let t = state = state + 0x6d2b79f5 | 0;
  t = Math.imul(t ^ t >>> 15, t | 1);
  t ^= t + Math.imul(t ^ t >>> 7, t | 61);
  return ((t ^ t >>> 14) + 2 ** 31 + 0.5) / 2 ** 32;
}
function truncatedNormal() {
  const z = Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  return Math.abs(z) > 2 ? truncatedNormal() : z;
}
// Glorot: variance 2/(inputs + outputs), of which truncation leaves a deviation of 0.8796; biases are zero.
function randomWeights(seed) {
  state = Math.imul(seed + 1, 0x9e3779b1);
  const w = zeros(SIZE), [W1, , W2] = layers(w);
  for (const [W, fans] of [[W1, PIXELS + HIDDEN], [W2, HIDDEN + CLASSES]])
    for (let i = 0; i < W.length; i++) W[i] = truncatedNormal() * Math.sqrt(2 / fans) / 0.8796256610342398;
  return w;
}

// ---- the loop ----------------------------------------------------------------------------------------------------------

const settings = { rule: "sam", learningRate: 0.3, rho: 0.1, tolerance: 1e-3 };
let w, velocity, vectors, step = 0, left = 0, running = false, gradNorm; // gradNorm: at the last step

function start(weights) {
  [w, velocity, step] = [weights, zeros(SIZE), 0];
  vectors = Array.from({ length: KEPT }, () => zeros(SIZE).map(truncatedNormal));
}

function measureAndStep() {
  const point = lossAt(w);
  const row = { step, loss: point.loss, gradNorm: norm(point.gradient), diverged: !(point.loss < DIVERGED) };
  if (row.diverged) return row;
  gradNorm = row.gradNorm;
  // A little noise on the last vector, or a direction that all of them miss could stay unseen.
  vectors[KEPT - 1] = plus(vectors[KEPT - 1], 0.3 / Math.sqrt(SIZE), zeros(SIZE).map(truncatedNormal));
  const top = sharpest((v) => product(point, v), vectors, settings.tolerance);
  vectors = top.vectors;
  w = RULES[settings.rule].step(point, settings);
  step++;
  return { ...row, sharpness: top.value, residual: top.residual, products: top.products, ...edges() };
}
const edges = () => ({ edge: RULES[settings.rule].edge(gradNorm, settings), gdEdge: 2 / settings.learningRate });

function work() { // for a moment: then messages are read
  const rows = [], until = performance.now() + 30;
  while (left > 0 && performance.now() < until) {
    rows.push(measureAndStep());
    left = rows.at(-1).diverged ? 0 : left - 1;
  }
  if (rows.length) postMessage({ rows });
  running = left > 0;
  if (running) setTimeout(work);
}

onmessage = ({ data: { digits, seed, weights, steps, ...rest } }) => {
  Object.assign(settings, rest);
  if (digits !== undefined) read(digits);
  if (weights !== undefined) start(Float64Array.from(weights));
  else if (seed !== undefined) start(randomWeights(seed));
  if (steps !== undefined) left = steps;
  if (left > 0 && !running) {
    running = true;
    setTimeout(work);
  } else if (left === 0) postMessage({ edges: edges() }); // of the last step, under the settings of now
};
