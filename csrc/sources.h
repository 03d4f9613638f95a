#pragma once

namespace bitorch_qlinear {

// Digest of the sources that this library or module was compiled from (bitorch_qlinear/_sources.py). The import compares
// it with the other parts' and, in a checkout, with the sources that are there.
const char* sources_digest();

}  // namespace bitorch_qlinear
