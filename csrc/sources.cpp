// This is the only file that is compiled again whenever any source changes: setup.py writes sources_digest.h before
// each build.
#include "sources.h"

#include "sources_digest.h"

const char* bitorch_qlinear::sources_digest() { return BITORCH_QLINEAR_SOURCES; }
