// Choosing tokens where the logits are. What is chosen is what sampler.rs defines for the host; see there for the rules.
#include "cuda.cuh"

constexpr int SAMPLE_WARPS = 16;
constexpr int SAMPLE_THREADS = SAMPLE_WARPS * WARP;
// Most alternatives of a token.
constexpr int SAMPLE_TOP = 20;
// Weights are integers, so their sums do not depend on the order. This is the weight of the most likely token; the sum of
// 2^20 tokens still fits.
constexpr float SAMPLE_ONE = 8796093022208.f;

// What changes a token's logit, in this order.
struct Change {
    int token;
    // Whether the repetition penalty applies.
    int is_repeated;
    float subtracted;
    float bias;
    // Written by the kernel: the logit before.
    float raw;
};

struct Choice {
    double top_p;
    // Added to the greatest logit, it is the least logit that min-p keeps.
    double min_p_distance;
    // A random number, times 2^64.
    uint64_t random;
    // 1 / temperature; 0: the most likely token.
    float sharpness;
    float repetition_penalty;
    int row;
    // 0: all tokens.
    int top_k;
    // Below 0: no log-probabilities at all.
    int alternatives;
    // In words from the start of `pool`.
    int changes;
    int num_changes;
    // Below 0: all tokens are allowed.
    int mask;
    int mask_words;
    // Taken if the mask does not allow the token that was chosen.
    int otherwise;
};

struct Chosen {
    int token;
    float logprob;
    struct {
        // Below 0: there are no more.
        int token;
        float logprob;
    } top[SAMPLE_TOP];
};

struct Sample {
    // [blocks].
    const Choice *choices;
    // Changes and masks.
    uint32_t *pool;
    // [rows, stride]. The rows of the choices are changed.
    float *logits;
    // [blocks].
    Chosen *out;
    int vocab;
    int stride;
};

struct Totals {
    uint64_t count, weight;
};

struct SampleShared {
    Totals totals[SAMPLE_WARPS];
    uint64_t best[SAMPLE_WARPS];
    float raw;
};

// Orders logits as integers: NaN first, both zeros the same.
__device__ inline uint32_t key_of(float logit) {
    const float v = logit + 0.f;
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return v != v ? 0 : bits ^ (bits >> 31 ? ~0u : 1u << 31);
}

__device__ inline float logit_of(uint32_t key) {
    const uint32_t bits = key >> 31 ? key ^ 1u << 31 : ~key;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

// Orders tokens: by logit, and the first of equal ones is the greatest.
__device__ inline uint64_t rank_of(int token, float logit) { return uint64_t(key_of(logit)) << 32 | uint32_t(~token); }

// The worst token that is kept.
struct Cut {
    uint32_t key;
    int token;
    __device__ bool keeps(uint32_t other, int at) const { return other > key || (other == key && at <= token); }
};
constexpr int ALL_TOKENS = 0x7fffffff;

// A row of logits, and the block that works on it. All threads call its functions, and get the same results.
struct SampleRow {
    SampleShared &shared;
    float *logits;
    int vocab;
    float sharpness;
    // Of the last call of `find_best`.
    uint64_t best = 0;
    float greatest = 0;
    bool is_finite = false;

    template <class F> __device__ void each(F f) const {
        for (int token = threadIdx.x; token < vocab; token += SAMPLE_THREADS) f(token, logits[token]);
    }

    __device__ uint64_t weight(float logit) const { return uint64_t(expf(-((greatest - logit) * sharpness)) * SAMPLE_ONE); }

    __device__ Totals sum(Totals mine) const {
        UNROLL(5) for (int o = WARP / 2; o; o /= 2) {
            mine.count += __shfl_xor_sync(~0u, mine.count, o);
            mine.weight += __shfl_xor_sync(~0u, mine.weight, o);
        }
        if (threadIdx.x % WARP == 0) shared.totals[threadIdx.x / WARP] = mine;
        __syncthreads();
        Totals all = {};
        for (int w = 0; w < SAMPLE_WARPS; w++) {
            all.count += shared.totals[w].count;
            all.weight += shared.totals[w].weight;
        }
        // The next sum overwrites these.
        __syncthreads();
        return all;
    }

    __device__ uint64_t most(uint64_t mine) const {
        UNROLL(5) for (int o = WARP / 2; o; o /= 2) {
            const uint64_t other = __shfl_xor_sync(~0u, mine, o);
            mine = mine < other ? other : mine;
        }
        if (threadIdx.x % WARP == 0) shared.best[threadIdx.x / WARP] = mine;
        __syncthreads();
        for (int w = 0; w < SAMPLE_WARPS; w++) mine = mine < shared.best[w] ? shared.best[w] : mine;
        __syncthreads();
        return mine;
    }

    // Finds the most likely token, and whether the logits have a distribution.
    __device__ void find_best() {
        uint64_t mine = 0;
        Totals strange = {};
        each([&](int token, float logit) {
            const uint64_t rank = rank_of(token, logit);
            mine = mine < rank ? rank : mine;
            strange.count += logit != logit;
        });
        best = most(mine);
        greatest = logit_of(best >> 32);
        is_finite = sum(strange).count == 0 && greatest - greatest == 0.f;
    }

    __device__ int best_token() const { return int(~uint32_t(best)); }

    // Number and weight of the tokens that the cut keeps, with keys from `least` on.
    __device__ Totals measure(Cut cut, uint32_t least) const {
        Totals mine = {};
        each([&](int token, float logit) {
            const uint32_t key = key_of(logit);
            if (key >= least && cut.keeps(key, token)) {
                mine.count++;
                mine.weight += weight(logit);
            }
        });
        return sum(mine);
    }

    // The first token at which the sum of `value` over the tokens up to it passes `target`; -1 if none does. The range is
    // divided among the warps, again and again.
    template <class F> __device__ int place(uint64_t target, F value) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        for (int first = 0, end = vocab;;) {
            const int each = (end - first + SAMPLE_WARPS - 1) / SAMPLE_WARPS, from = first + warp * each;
            const int to = from + each < end ? from + each : end;
            uint64_t mine = 0;
            for (int token = from + lane; token < to; token += WARP) mine += value(token, logits[token]);
            UNROLL(5) for (int o = WARP / 2; o; o /= 2) mine += __shfl_xor_sync(~0u, mine, o);
            if (lane == 0) shared.totals[warp].weight = mine;
            __syncthreads();
            int found = 0;
            while (found < SAMPLE_WARPS && shared.totals[found].weight <= target) target -= shared.totals[found++].weight;
            __syncthreads();
            if (found == SAMPLE_WARPS) return -1;
            first += found * each;
            end = first + each < end ? first + each : end;
            if (each == 1) return first;
        }
    }

    // Keeps the most likely of the tokens that are kept, up to the one that reaches `target`: a number of tokens, or their
    // weight. Halves the range of keys that the last one may have, until one token is in it or all tokens have the same.
    __device__ Cut tighten(Cut cut, bool by_weight, uint64_t target) const {
        const auto value = [&](Totals of) { return by_weight ? of.weight : of.count; };
        uint32_t low = cut.key, high = key_of(greatest) + 1;
        Totals from_low = measure(cut, low), from_high = {};
        if (value(from_low) < target) return cut;
        while (high - low > 1 && from_low.count - from_high.count > 1) {
            const uint32_t middle = low + (high - low) / 2;
            const Totals of = measure(cut, middle);
            if (value(of) >= target) {
                low = middle;
                from_low = of;
            } else {
                high = middle;
                from_high = of;
            }
        }
        const uint64_t tied = from_low.count - from_high.count, missing = target - value(from_high);
        const uint64_t each = by_weight ? weight(logit_of(low)) : 1;
        const Cut all = {low, low == cut.key ? cut.token : ALL_TOKENS};
        if (tied == 1 || missing > (tied - 1) * each) return all;
        // Only the first of equal ones.
        const int last = place((missing + each - 1) / each - 1, [&](int token, float logit) {
            return uint64_t(key_of(logit) == low && cut.keeps(low, token));
        });
        return {low, last};
    }

    __device__ int draw(const Choice &c) const {
        if (!is_finite) return best_token();
        Cut cut = {key_of(float(double(greatest) + c.min_p_distance)), ALL_TOKENS};
        if (c.top_k > 0) cut = tighten(cut, false, c.top_k);
        Totals all = measure(cut, cut.key);
        if (c.top_p < 1) {
            cut = tighten(cut, true, uint64_t(ceil(c.top_p * double(all.weight))));
            all = measure(cut, cut.key);
        }
        const int token = place(__umul64hi(all.weight, c.random), [&](int token, float logit) {
            return cut.keeps(key_of(logit), token) ? weight(logit) : 0;
        });
        return token < 0 ? best_token() : token;
    }

    // Log-probabilities of the most likely tokens. Returns the logarithm of the sum of all.
    __device__ float report(int count, Chosen &out) {
        sharpness = 1;
        find_best();
        // Where the least key is, everything is kept.
        const float sum = is_finite ? float(measure({0, ALL_TOKENS}, 0).weight) / SAMPLE_ONE : NAN;
        const float normalizer = greatest + logf(sum);
        uint64_t last = ~uint64_t(0);
        for (int i = 0; i < count && i < SAMPLE_TOP; i++) {
            uint64_t mine = 0;
            each([&](int token, float logit) {
                const uint64_t rank = rank_of(token, logit);
                if (logit == logit && rank < last && rank > mine) mine = rank;
            });
            last = most(mine);
            if (threadIdx.x == 0) {
                out.top[i].token = last == 0 ? -1 : int(~uint32_t(last));
                out.top[i].logprob = logit_of(last >> 32) - normalizer;
            }
        }
        return normalizer;
    }
};

// A block for each choice. Grid: choices.
__device__ inline void sample(const Sample &p) {
    BLOCK_SHARED(SampleShared, shared);
    const Choice c = p.choices[blockIdx.x];
    Chosen &out = p.out[blockIdx.x];
    SampleRow row{shared, p.logits + size_t(c.row) * p.stride, p.vocab, c.sharpness};
    const float normalizer = c.alternatives < 0 ? NAN : row.report(c.alternatives, out);
    row.sharpness = c.sharpness;

    auto *changes = reinterpret_cast<Change *>(p.pool + c.changes);
    const uint32_t *mask = c.mask < 0 ? nullptr : p.pool + c.mask;
    for (int i = threadIdx.x; i < c.num_changes; i += SAMPLE_THREADS) {
        Change &change = changes[i];
        float &logit = row.logits[change.token], v = logit;
        change.raw = v;
        if (change.is_repeated) v = v > 0 ? v / c.repetition_penalty : v * c.repetition_penalty;
        logit = v - change.subtracted + change.bias;
    }
    __syncthreads();
    const auto allows = [&](int token) { return !mask || (token / 32 < c.mask_words && mask[token / 32] >> token % 32 & 1); };
    if (mask) {
        for (int token = threadIdx.x; token < p.vocab; token += SAMPLE_THREADS) {
            if (!allows(token)) row.logits[token] = -INFINITY;
        }
        __syncthreads();
    }
    row.find_best();
    int token = c.sharpness == 0 ? row.best_token() : row.draw(c);
    if (!allows(token)) token = c.otherwise;

    if (threadIdx.x == 0) shared.raw = token < p.vocab ? row.logits[token] : NAN;
    __syncthreads();
    for (int i = threadIdx.x; i < c.num_changes; i += SAMPLE_THREADS) {
        if (changes[i].token == token) shared.raw = changes[i].raw;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        out.token = token;
        out.logprob = shared.raw - normalizer;
    }
}

KERNEL(sample_rows, Sample, SAMPLE_THREADS, sample)
