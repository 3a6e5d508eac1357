#define SYNTHWARD_ISA avx2
#define SYNTHWARD_ISA_NAME "avx2"
#include "core/all.inl"
