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

#define OMNIAD_ABI 3 /* of this header; counts up with every change that a caller would have to follow */

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
    OMNIAD_LOST_ERROR = 6,     /* the GPU or its context is lost for good: the process has to be started anew */
} omniad_status;

typedef struct omniad_runtime omniad_runtime;

/* Instead of a device's ordinal: the context of the calling thread, which must outlive the runtime; of a thread
 * that has none, the primary context of device 0. */
#define OMNIAD_CALLERS_DEVICE (-1)

/* A part of a bundle, like "fused/plan.json". */
typedef struct omniad_part {
    const char *name;
    const void *content;
    size_t bytes;
} omniad_part;

/* Sizes of one image. peaks: values whose largest is its score; embedding: channels, see omniad_run. device: its
 * ordinal; stream: that of the runs (a CUstream), for who lets it wait until a frame on the GPU is written. */
typedef struct omniad_info {
    int32_t device, height, width, peaks, embedding;
    size_t pixels_bytes, anomaly_map_bytes, peaks_bytes;
    void *stream;
} omniad_info;

/* Where a frame lies, and if on the GPU, when it is written. */
typedef enum omniad_place {
    OMNIAD_HOST = 0,
    OMNIAD_GPU = 1,              /* it is written, or `omniad_info.stream` waits for it already */
    OMNIAD_GPU_AFTER_STREAM = 2, /* by what the frame's stream has been given to do */
    OMNIAD_GPU_AFTER_ALL = 3,    /* by anything that the context has been given to do */
} omniad_place;

/* A frame: uint8 BGR (rows, columns, 3); row_bytes from a row's start to the next one's. On the GPU it is read
 * where it lies, and its rows follow each other: row_bytes == 3 * columns. */
typedef struct omniad_frame {
    const uint8_t *bgr; /* or an address on the GPU */
    int64_t rows, columns, row_bytes;
    omniad_place place;
    void *stream; /* of OMNIAD_GPU_AFTER_STREAM */
} omniad_frame;

/* Like "0.1.0". */
OMNIAD_API const char *omniad_version(void);

/* OMNIAD_ABI of the header that the library was built with. */
OMNIAD_API int omniad_abi(void);

/* Words for this thread's last failure: what was expected, what came, what to do. Valid until its next one. */
OMNIAD_API const char *omniad_last_error(void);

/* Like 90 for sm_90: for which a bundle must have kernels. device: as in omniad_open */
OMNIAD_API omniad_status omniad_get_architecture(int device, int *architecture);

/* Everything that takes time or memory: reads and checks the bundle, loads its kernels and weights, captures the
 * launches in a CUDA graph for each of `count` batch sizes. On failure *runtime is NULL.
 * device: an ordinal of the CUDA driver, whose primary context is used, or OMNIAD_CALLERS_DEVICE
 * batches: how many images a run may have, each 1 to 64; they share weights and memory: that of the largest
 * A bundle whose images are cut into tiles is refused; see `--tiles` in README.md. */
OMNIAD_API omniad_status omniad_open(const char *path, int device, const int *batches, int count,
                                     omniad_runtime **runtime);

/* The same of a bundle that the caller has read and checked; its parts may go afterwards. Needed are
 * fused/plan.json, fused/sm_XX.bin and .json of this GPU, and weights.onnx; for `omniad_self_test` that too. */
OMNIAD_API omniad_status omniad_open_parts(const omniad_part *parts, int part_count, int device,
                                           const int *batches, int count, omniad_runtime **runtime);

/* Frees everything; NULL is allowed. No other thread may be using it, nor a graph that captured `omniad_enqueue`.
 */
OMNIAD_API omniad_status omniad_close(omniad_runtime *runtime);

/* Computes the bundle's few self-test images with each batch size. OMNIAD_ENGINE_ERROR: a map or score is not the
 * trained network's, so that nothing should be inspected on this machine; call it once before the first frame.
 * OMNIAD_BUNDLE_ERROR: the bundle has no such images, or not as omniad-export writes them. */
OMNIAD_API omniad_status omniad_self_test(omniad_runtime *runtime);

OMNIAD_API omniad_status omniad_get_info(const omniad_runtime *runtime, omniad_info *info);

/* All on the host, done when it returns. images: one of the batch sizes
 * pixels: (images, height, width, 3) uint8 RGB; anomaly_map: (images, height, width); pred_score: (images)
 * embedding: (images, info.embedding), from which the Python package recognises the product; or NULL */
OMNIAD_API omniad_status omniad_run(omniad_runtime *runtime, int images, const uint8_t *pixels, float *anomaly_map,
                                    float *pred_score, float *embedding);

/* The same of frames of any sizes, which are resized on the GPU. count: one of the batch sizes
 * prepare_ms: (count), what the host took until each was on its way to that; or NULL */
OMNIAD_API omniad_status omniad_run_frames(omniad_runtime *runtime, const omniad_frame *frames, int count,
                                           float *anomaly_map, float *pred_score, float *embedding,
                                           double *prepare_ms);

/* Queues a run on a stream of the runtime's context (a CUstream, or a cudaStream_t) and returns: it waits for
 * nothing, allocates nothing, loads nothing. images: one of the batch sizes
 * The other arguments are addresses on that GPU: pixels: (images, height, width, 3) uint8 RGB;
 * anomaly_map: (images, height, width) fp32; peaks: (images, peaks) fp32
 * Runs of one runtime on several streams follow each other. If the stream is being captured the launches become
 * part of that graph; then it is the caller who keeps runs of this runtime apart. */
OMNIAD_API omniad_status omniad_enqueue(omniad_runtime *runtime, void *stream, int images, uint64_t pixels,
                                        uint64_t anomaly_map, uint64_t peaks);

#ifdef __cplusplus
}
#endif

#endif
