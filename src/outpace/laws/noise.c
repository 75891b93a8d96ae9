/* Words of Philox-4x32-10 for the token ids of a position, as float32; see `laws.noise`, which has the same in numpy. */

#include <stdint.h>

#define M0 0xD2511F53u
#define M1 0xCD9E8D57u
#define W0 0x9E3779B9u
#define W1 0xBB67AE85u
#define TOGETHER 64 /* counters at once: the compiler makes vectors of them */

/* out [4 * count]: counter (position, low, high, tail | i) gives words 4 i to 4 i + 3. */
void outpace_words(uint32_t position, uint32_t low, uint32_t high, uint32_t tail, uint32_t key0, uint32_t key1, float *out,
                   int64_t count) {
    for (int64_t from = 0; from < count; from += TOGETHER) {
        uint32_t a[TOGETHER], b[TOGETHER], c[TOGETHER], d[TOGETHER], k0 = key0, k1 = key1;
        int64_t some = count - from < TOGETHER ? count - from : TOGETHER;
        for (int i = 0; i < TOGETHER; i++) a[i] = position, b[i] = low, c[i] = high, d[i] = tail | (uint32_t)(from + i);
        for (int round = 0; round < 10; round++, k0 += W0, k1 += W1)
            for (int i = 0; i < TOGETHER; i++) {
                uint64_t one = (uint64_t)M0 * a[i], two = (uint64_t)M1 * c[i];
                a[i] = (uint32_t)(two >> 32) ^ b[i] ^ k0, b[i] = (uint32_t)two;
                c[i] = (uint32_t)(one >> 32) ^ d[i] ^ k1, d[i] = (uint32_t)one;
            }
        for (int64_t i = 0; i < some; i++) {
            float *to = out + 4 * (from + i);
            to[0] = (float)a[i], to[1] = (float)b[i], to[2] = (float)c[i], to[3] = (float)d[i];
        }
    }
}
