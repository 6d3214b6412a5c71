// A CUDA driver that is none, for Triton's own launcher: it answers as one multiprocessor of sm_90
// would, and keeps what the last launch was asked.

#include "cuda.h"
#include <stdint.h>
#include <string.h>

typedef struct {
  uint32_t grid[3], block[3], shared_bytes, attributes, first_attribute;
  uint64_t stream, function;
  uint8_t values[64][128];
} Launched;

static Launched last;
static uint32_t launches, sizes[64], count;

// How many arguments the next kernel has, and how many bytes each of them.
void fake_expect(uint32_t number, const uint32_t *bytes) {
  count = number;
  memcpy(sizes, bytes, number * sizeof(uint32_t));
}

uint32_t fake_launches(void) { return launches; }
const Launched *fake_last(void) { return &last; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments,
                          void **extra) {
  memset(&last, 0, sizeof(last));
  const uint32_t grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const uint32_t block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  memcpy(last.grid, grid, sizeof(grid));
  memcpy(last.block, block, sizeof(block));
  last.shared_bytes = config->sharedMemBytes;
  last.attributes = config->numAttrs;
  last.first_attribute = config->numAttrs ? config->attrs[0].id : 0;
  last.stream = (uint64_t)config->hStream;
  last.function = (uint64_t)function;
  for (uint32_t i = 0; i < count; ++i)
    memcpy(last.values[i], arguments[i], sizes[i]);
  ++launches;
  return extra == NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// The map is what it was made of: address, rank, element type, extents, box.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *extents,
                                const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  uint64_t *words = (uint64_t *)map;
  words[0] = (uint64_t)address;
  words[1] = rank;
  words[2] = type;
  for (cuuint32_t i = 0; i < rank; ++i) {
    words[3 + i] = extents[i];
    words[8 + i] = box[i];
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return memcmp(image, "\x7f" "ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = 232448;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = 233472;
    break;
  default:
    *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "no such device";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)&last;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

// Not called while there is a context.
CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return CUDA_SUCCESS; }
