// From logits to tokens: soft cap, edits, mask, temperature, min-p, top-k, top-p, the draw; log-probabilities; scores.
//
// sample: grid: one block of 512 threads per row. logits [rows][V] f32 (changed in place: capped and edited); rows
// [rows] of Want; edits and masks as in src/device/batch.rs; kept: as many f32 as edits; out [rows] of Drawn. V is at most 2^18.
// Passes over a row: 1 (greedy); 1 (log-probabilities); 6 for top-n, 6 for top-k, 5 for top-p; 4 for a draw, 6 for one after any of
// top-k, top-p and min-p. Each asks for 4 bytes per logit (from the caches, after the first); and each warp for 8 to 14 words of what is
// wanted. An exponential is 21 operations, which the first pass of a search takes of every logit that is kept, later ones of fewer.
// Bank conflicts: of atomic additions to digits that share a bank, which depends on the logits: a pass for 8 logits and search at most.
//
// The same steps as src/device/sample.rs, which says what they mean. Weights e^((x - max) / temperature) are its f32 bits,
// but sums are of weights in units of 2^-44, as integers: exact, so that the order in which threads add does not matter. A
// draw is that of the host but where its rounded sums decide otherwise; log-probabilities differ in the last place.
// Whatever must be found in the order of likelihood is found digit by digit of the sort key (descend): no sort.
#include "exact.cuh"

#define THREADS 512
#define MAX_TOP 20
#define BROKEN 0xffffffffu
// A digit of a key.
#define DIGIT_BITS 11
#define DIGITS (1 << DIGIT_BITS)

struct Edit {
    u32 token;
    float penalty, bias;
};

struct Want {
    float temperature, top_p, min_p;
    u32 top_k;
    u64 seed;
    u32 choice, position;
    // The token to score, or UNMAPPED to draw one.
    u32 score;
    u32 logprob;
    u32 n_top;
    u32 edits_start, n_edits;
    // Which mask holds, or UNMAPPED.
    u32 mask;
};

struct Drawn {
    u32 token;
    float logprob;
    u32 n_top;
    u32 top[MAX_TOP];
    float top_logprob[MAX_TOP];
};

// A row's logits as a draw sees them.
struct Logits {
    const float* values;
    // Null if every token is allowed.
    const u32* mask;
    u32 n;
};

DEVICE float at(const Logits& l, u32 token) {
    return l.mask && !(l.mask[token / 32] >> token % 32 & 1) ? NEG_INF : l.values[token];
}

// Sort key of a token: smaller is likelier, equal logits by id.
DEVICE u64 key_of(float logit, u32 token) {
    u32 bits = __float_as_uint(logit + 0.0f);
    u32 ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (u64)~ascending << 32 | token;
}

DEVICE u32 token_of(u64 key) { return (u32)key; }

// e^((x - max) / temperature) in units of 2^-44.
DEVICE u64 weight(float logit, float max, float temperature) {
    return (u64)((double)exp_exact((logit - max) / temperature) * 17592186044416.0);
}

struct Shared {
    u64 sums[DIGITS];
    u64 warps[THREADS / 32];
    u64 top[MAX_TOP];
    u64 result, before;
    u32 n_top;
};

DEVICE u64 shuffle_xor(u64 x, int step) {
    return (u64)__shfl_xor_sync(0xffffffffu, (u32)(x >> 32), step) << 32 | __shfl_xor_sync(0xffffffffu, (u32)x, step);
}

// Of all threads; exact, so in any order.
template <typename F> DEVICE u64 fold_all(u64 x, Shared& shared, F fold) {
    for (int step = 16; step > 0; step /= 2) x = fold(x, shuffle_xor(x, step));
    if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared.warps[0];
    for (int i = 1; i < THREADS / 32; i++) x = fold(x, shared.warps[i]);
    __syncthreads();
    return x;
}

DEVICE u64 least(u64 x, Shared& shared) { return fold_all(x, shared, [](u64 a, u64 b) { return a < b ? a : b; }); }
DEVICE u64 sum(u64 x, Shared& shared) { return fold_all(x, shared, [](u64 a, u64 b) { return a + b; }); }

// The key of the likeliest token; BROKEN as its token if a logit is NaN or +infinity, or none is finite.
DEVICE u64 likeliest(const Logits& l, Shared& shared) {
    u64 best = ~0ull;
    u64 unusable = 0;
    for (u32 i = threadIdx.x; i < l.n; i += THREADS) {
        float x = at(l, i);
        // False for NaN, too.
        unusable |= !(x < __int_as_float(0x7f800000));
        u64 key = key_of(x, i);
        if (x > NEG_INF && key < best) best = key;
    }
    best = least(best, shared);
    return sum(unusable, shared) != 0 ? ~0ull : best;
}

DEVICE float logit_of(u64 key) {
    u32 ascending = ~(u32)(key >> 32);
    return __uint_as_float(ascending >> 31 ? ascending & 0x7fffffffu : ~ascending);
}

// The first key, in the order of keys, up to and with which the amounts add up to more than `target`; `before` is what they
// add up to without it. amount(token, logit) is 0 for what is left out. The total must be over the target.
// Keys have 32 bits of the logit and 18 of the token: five digits, most significant first. Keys that are tokens have the last three.
template <typename K, typename A>
DEVICE u64 descend(const Logits& l, Shared& shared, u64 target, int first_digit, K key, A amount, u64& before) {
    u64 prefix = 0;
    before = 0;
    for (int d = first_digit; d < 5; d++) {
        int shift = d == 4 ? 0 : 39 - DIGIT_BITS * d, above = 50 - DIGIT_BITS * d;
        for (u32 i = threadIdx.x; i < DIGITS; i += THREADS) shared.sums[i] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < l.n; i += THREADS) {
            float x = at(l, i);
            u64 k = key(x, i);
            if (k >> above != prefix) continue;
            u64 a = amount(x, i);
            if (a != 0) atomicAdd(&shared.sums[(k >> shift) - (prefix << (above - shift))], a);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            // A lane adds up 64 digits; then the lane whose share holds the target looks at its own.
            const u32 share = DIGITS / 32;
            u64 mine = 0;
            // Each begins at another digit: banks differ.
#pragma unroll 4
            for (u32 i = 0; i < share; i++) mine += shared.sums[threadIdx.x * share + (i + threadIdx.x) % share];
            u64 start = before;
            for (u32 lane = 0; lane < 32; lane++) {
                u64 theirs = (u64)__shfl_sync(0xffffffffu, (u32)(mine >> 32), lane) << 32 |
                             __shfl_sync(0xffffffffu, (u32)mine, lane);
                if (lane < threadIdx.x) start += theirs;
            }
            if (start <= target && start + mine > target) {
                u32 digit = threadIdx.x * share;
                while (start + shared.sums[digit] <= target) start += shared.sums[digit++];
                shared.result = (prefix << (above - shift)) + digit;
                shared.before = start;
            }
        }
        __syncthreads();
        prefix = shared.result;
        before = shared.before;
        __syncthreads();
    }
    return prefix;
}

// A sort key in 50 bits, and back.
DEVICE u64 narrow(u64 key) { return key >> 32 << 18 | (key & 0x3ffff); }
DEVICE u64 wide(u64 narrowed) { return narrowed >> 18 << 32 | (narrowed & 0x3ffff); }

// descend in the order of likelihood.
template <typename A> DEVICE u64 descend_likely(const Logits& l, Shared& shared, u64 target, A amount, u64& before) {
    auto key = [](float x, u32 token) { return narrow(key_of(x, token)); };
    return wide(descend(l, shared, target, 0, key, amount, before));
}

// A token drawn at random.
DEVICE u32 draw(const Logits& l, float max, const Want& want, Shared& shared) {
    u64 bits = random_bits(want.seed, want.choice, want.position), before;
    float temperature = want.temperature;
    // What is kept are the keys up to the last one.
    u64 last = ~0ull;
    bool all = true;
    if (want.min_p > 0.0f) {
        float bound = max + temperature * ln_exact(want.min_p);
        last = key_of(bound, 0xffffffffu);
        all = false;
    }
    if (want.top_k != 0 && want.top_k < l.n) {
        auto count = [&](float x, u32 token) { return (u64)(key_of(x, token) <= last); };
        u64 n = 0;
        for (u32 i = threadIdx.x; i < l.n; i += THREADS) n += count(at(l, i), i);
        if (sum(n, shared) > want.top_k) last = descend_likely(l, shared, want.top_k - 1, count, before);
        all = false;
    }
    auto kept = [&](float x, u32 token) {
        return key_of(x, token) <= last ? weight(x, max, temperature) : 0;
    };
    u64 mass = 0;
    for (u32 i = threadIdx.x; i < l.n; i += THREADS) mass += kept(at(l, i), i);
    mass = sum(mass, shared);
    if (want.top_p < 1.0f) {
        // The shortest run that holds the mass; at least the likeliest.
        double wanted = (double)want.top_p * (double)mass;
        u64 least_mass = (u64)wanted + ((double)(u64)wanted < wanted);
        u64 target = least_mass == 0 ? 0 : least_mass - 1;
        u64 nucleus_end = descend_likely(l, shared, target < mass ? target : mass - 1, kept, before);
        last = nucleus_end;
        mass = before + weight(logit_of(nucleus_end), max, temperature);
        all = false;
    }
    // floor(u · mass) for u = bits / 2^52.
    u64 target = __umul64hi(bits, mass) << 12 | bits * mass >> 52;
    if (all) {
        auto id = [](float, u32 token) { return (u64)token; };
        return (u32)descend(l, shared, target, 2, id, kept, before);
    }
    return token_of(descend_likely(l, shared, target, kept, before));
}

// The likeliest tokens, likeliest first, with their logits less the largest one and the logarithm of the sum.
DEVICE void likeliest_n(const Logits& l, float max, float log_total, u32 n, Drawn& out, Shared& shared) {
    u64 before;
    auto one = [](float, u32) { return (u64)1; };
    u64 last = n < l.n ? descend_likely(l, shared, n - 1, one, before) : ~0ull;
    n = n < l.n ? n : l.n;
    if (threadIdx.x == 0) shared.n_top = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < l.n; i += THREADS) {
        u64 key = key_of(at(l, i), i);
        if (key <= last) shared.top[atomicAdd(&shared.n_top, 1u)] = key;
    }
    __syncthreads();
    if (threadIdx.x < n) {
        u64 key = shared.top[threadIdx.x];
        u32 rank = 0;
        for (u32 i = 0; i < n; i++) rank += shared.top[i] < key;
        out.top[rank] = token_of(key);
        out.top_logprob[rank] = (l.values[token_of(key)] - max) - log_total;
    }
    if (threadIdx.x == 0) out.n_top = n;
    __syncthreads();
}

// Applies a row's edits; what the logits were before goes to `kept`.
DEVICE void edit(float* logits, const Edit* edits, float* kept, u32 n) {
    for (u32 i = threadIdx.x; i < n; i += THREADS) {
        Edit e = edits[i];
        float x = logits[e.token];
        kept[i] = x;
        logits[e.token] = (x > 0.0f ? x / e.penalty : x * e.penalty) + e.bias;
    }
    __syncthreads();
}

// Draws (or takes) the row's token and writes what is asked for.
DEVICE void sample_row(
    float* logits, u32 n_vocab, const Want& want, const Edit* edits, const u32* masks, float* kept, Drawn& out, Shared& shared) {
    Logits own = {logits, 0, n_vocab};
    u64 best = likeliest(own, shared);
    float max = logit_of(best), log_total = 0.0f;
    u32 token = best == ~0ull ? BROKEN : want.score != UNMAPPED ? want.score : token_of(best);
    bool logprob = want.logprob || want.score != UNMAPPED;
    if (threadIdx.x == 0) out.n_top = 0;
    __syncthreads();
    if (token != BROKEN && (logprob || want.n_top > 0)) {
        u64 total = 0;
        for (u32 i = threadIdx.x; i < n_vocab; i += THREADS) total += weight(logits[i], max, 1.0f);
        log_total = ln_exact((float)((double)sum(total, shared) / 17592186044416.0));
        if (want.n_top > 0) likeliest_n(own, max, log_total, want.n_top, out, shared);
    }
    float own_max = max;
    bool shaped = want.n_edits != 0 || want.mask != UNMAPPED;
    if (token != BROKEN && want.score == UNMAPPED) {
        Logits l = {logits, want.mask == UNMAPPED ? 0 : masks + (u64)want.mask * ((n_vocab + 31) / 32), n_vocab};
        if (shaped) {
            edit(logits, edits + want.edits_start, kept + want.edits_start, want.n_edits);
            best = likeliest(l, shared);
            max = logit_of(best);
            token = best == ~0ull ? BROKEN : token_of(best);
        }
        if (token != BROKEN && want.temperature != 0.0f) token = draw(l, max, want, shared);
    }
    if (threadIdx.x != 0) return;
    out.token = token;
    out.logprob = __int_as_float(0x7fc00000);
    if (token == BROKEN) out.n_top = 0;
    if (token != BROKEN && logprob) {
        float x = logits[token];
        if (want.score == UNMAPPED)
            for (u32 i = 0; i < want.n_edits; i++)
                if (edits[want.edits_start + i].token == token) x = kept[want.edits_start + i];
        out.logprob = (x - own_max) - log_total;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(
    float* logits, u32 n_vocab, float cap, const Want* wants, const Edit* edits, const u32* masks, float* kept, Drawn* out) {
    __shared__ Shared shared;
    float* row = logits + (u64)blockIdx.x * n_vocab;
    if (cap > 0.0f) {
        for (u32 i = threadIdx.x; i < n_vocab; i += THREADS) row[i] = cap * tanh_approx(row[i] / cap);
        __syncthreads();
    }
    sample_row(row, n_vocab, wants[blockIdx.x], edits, masks, kept, out[blockIdx.x], shared);
}
