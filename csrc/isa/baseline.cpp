#define SYNTHWARD_ISA baseline
#define SYNTHWARD_ISA_NAME "baseline"
#include "core/all.inl"
