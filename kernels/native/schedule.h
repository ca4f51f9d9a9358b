#pragma once

#include "plan.h"

namespace omniad {

// The plan for another number of images, with every buffer in the place that kernels/schedule.py gives it. The
// kernels are the same.
Plan forBatch(Plan plan, int batch);

}  // namespace omniad
