#define SYNTHWARD_ISA avx512
#define SYNTHWARD_ISA_NAME "avx512"
#include "core/all.inl"
