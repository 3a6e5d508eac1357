// ChaCha20 (RFC 8439, section 2.3, with the original 64-bit counter and 64-bit nonce), one block per lane.
//
// State words: 0-3 constants, 4-11 key, 12-13 block counter, 14-15 nonce = stream << 48 | step.
// The top bit of the stream marks the extension block that refines rare radii (gaussian.inl).

SYNTHWARD_INLINE void quarter_round(vu& a, vu& b, vu& c, vu& d) {
  a += b;
  d = rotate_left<16>(d ^ a);
  c += d;
  b = rotate_left<12>(b ^ c);
  a += b;
  d = rotate_left<8>(d ^ a);
  c += d;
  b = rotate_left<7>(b ^ c);
}

// words[w] holds word w of the blocks counter .. counter + LANES - 1.
SYNTHWARD_INLINE void chacha(const uint32_t* state, uint64_t counter, vu* words) {
  vu lane;
  for (int l = 0; l < LANES; ++l) lane[l] = (uint32_t)l;
  const vu low = splat((uint32_t)counter) + lane;
  // A lane whose low word wrapped around carries into the high word.
  const vu high = splat((uint32_t)(counter >> 32)) - (vu)(low < lane);
  vu x0 = splat(state[0]), x1 = splat(state[1]), x2 = splat(state[2]), x3 = splat(state[3]);
  vu x4 = splat(state[4]), x5 = splat(state[5]), x6 = splat(state[6]), x7 = splat(state[7]);
  vu x8 = splat(state[8]), x9 = splat(state[9]), x10 = splat(state[10]), x11 = splat(state[11]);
  vu x12 = low, x13 = high, x14 = splat(state[14]), x15 = splat(state[15]);
  for (int round = 0; round < 10; ++round) {
    quarter_round(x0, x4, x8, x12);
    quarter_round(x1, x5, x9, x13);
    quarter_round(x2, x6, x10, x14);
    quarter_round(x3, x7, x11, x15);
    quarter_round(x0, x5, x10, x15);
    quarter_round(x1, x6, x11, x12);
    quarter_round(x2, x7, x8, x13);
    quarter_round(x3, x4, x9, x14);
  }
  words[0] = x0 + splat(state[0]);
  words[1] = x1 + splat(state[1]);
  words[2] = x2 + splat(state[2]);
  words[3] = x3 + splat(state[3]);
  words[4] = x4 + splat(state[4]);
  words[5] = x5 + splat(state[5]);
  words[6] = x6 + splat(state[6]);
  words[7] = x7 + splat(state[7]);
  words[8] = x8 + splat(state[8]);
  words[9] = x9 + splat(state[9]);
  words[10] = x10 + splat(state[10]);
  words[11] = x11 + splat(state[11]);
  words[12] = x12 + low;
  words[13] = x13 + high;
  words[14] = x14 + splat(state[14]);
  words[15] = x15 + splat(state[15]);
}

SYNTHWARD_INLINE void set_state(const NoiseStream* stream, uint32_t* state) {
  const uint32_t constants[4] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};
  for (int i = 0; i < 4; ++i) state[i] = constants[i];
  for (int i = 0; i < 8; ++i) state[4 + i] = stream->key[i];
  state[12] = state[13] = 0;
  state[14] = (uint32_t)stream->nonce;
  state[15] = (uint32_t)(stream->nonce >> 32);
}

static void chacha_blocks16(const uint32_t* state, uint64_t counter, uint32_t* out) {
  for (int first = 0; first < 16; first += LANES) {
    vu words[16];
    chacha(state, counter + (uint64_t)first, words);
    for (int w = 0; w < 16; ++w) __builtin_memcpy(out + w * 16 + first, &words[w], sizeof(vu));
  }
}
