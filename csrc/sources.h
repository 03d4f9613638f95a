#pragma once

namespace bitorch_qlinear {

// Returns the digest of the sources that this library or module was compiled from (bitorch_qlinear/_sources.py). The
// import compares it with those of the other parts and, in a checkout, of the present sources.
const char* sources_digest();

}  // namespace bitorch_qlinear
