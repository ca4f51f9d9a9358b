/* omniad-edge on an NVIDIA GPU from C and C++: a bundle in, anomaly maps and scores out.
 *
 * Needs the NVIDIA driver (libcuda.so.1, CUDA 11.8 or newer) when a bundle is opened, and nothing of CUDA before.
 * Every function but omniad_version and omniad_last_error returns a status; what it means in this case, and what
 * to do, says omniad_last_error. A runtime may be used by several threads, which take turns.
 */
#ifndef OMNIAD_H
#define OMNIAD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define OMNIAD_API __attribute__((visibility("default")))
#else
#define OMNIAD_API
#endif

typedef enum omniad_status {
    OMNIAD_OK = 0,
    OMNIAD_INPUT_ERROR = 1,    /* an argument is not what this header says */
    OMNIAD_BUNDLE_ERROR = 2,   /* the file is missing, damaged, crafted or not of this version */
    OMNIAD_ENGINE_ERROR = 3,   /* no GPU, no driver, no kernels for this GPU, or the GPU failed */
    OMNIAD_MEMORY_ERROR = 4,   /* the host has too little memory */
    OMNIAD_INTERNAL_ERROR = 5, /* a mistake in this library */
} omniad_status;

typedef struct omniad_runtime omniad_runtime;

/* peaks: values for each image, whose largest is its score. The sizes in bytes are of all images of the batch. */
typedef struct omniad_sizes {
    int32_t batch, height, width, peaks;
    size_t pixels_bytes, anomaly_map_bytes, peaks_bytes;
} omniad_sizes;

/* A frame on the host: uint8 BGR (rows, columns, 3); row_bytes from a row's start to the next one's. */
typedef struct omniad_frame {
    const uint8_t *bgr;
    int64_t rows, columns, row_bytes;
} omniad_frame;

/* Like "0.1.0". */
OMNIAD_API const char *omniad_version(void);

/* Words for this thread's last failure: what was expected, what came, what to do. Valid until its next one. */
OMNIAD_API const char *omniad_last_error(void);

/* Everything that takes time or memory: reads and checks the bundle, loads its kernels and weights, captures the
 * launches in a CUDA graph. device: the ordinal of the CUDA driver; its primary context is used.
 * batch: images a run, 1 to 64. On failure *runtime is NULL. */
OMNIAD_API omniad_status omniad_open(const char *path, int device, int batch, omniad_runtime **runtime);

/* Frees everything; NULL is allowed. No other thread may be using it, nor a graph that captured `omniad_enqueue`.
 */
OMNIAD_API omniad_status omniad_close(omniad_runtime *runtime);

OMNIAD_API omniad_status omniad_get_sizes(const omniad_runtime *runtime, omniad_sizes *sizes);

/* All on the host, done when it returns.
 * pixels: (batch, height, width, 3) uint8 RGB; anomaly_map: (batch, height, width); pred_score: (batch) */
OMNIAD_API omniad_status omniad_run(omniad_runtime *runtime, const uint8_t *pixels, float *anomaly_map,
                                    float *pred_score);

/* The same of `count` == batch frames of any sizes, which are resized on the GPU. */
OMNIAD_API omniad_status omniad_run_frames(omniad_runtime *runtime, const omniad_frame *frames, int count,
                                           float *anomaly_map, float *pred_score);

/* Queues a run on a stream of the device's primary context (a CUstream, or a cudaStream_t) and returns: it waits
 * for nothing, allocates nothing, loads nothing. The arguments are addresses on that GPU:
 * pixels: (batch, height, width, 3) uint8 RGB; anomaly_map: (batch, height, width) fp32; peaks: (batch, peaks)
 * fp32 Runs of one runtime on several streams follow each other. If the stream is being captured the launches
 * become part of that graph; then it is the caller who keeps runs of this runtime apart. */
OMNIAD_API omniad_status omniad_enqueue(omniad_runtime *runtime, void *stream, uint64_t pixels,
                                        uint64_t anomaly_map, uint64_t peaks);

#ifdef __cplusplus
}
#endif

#endif
