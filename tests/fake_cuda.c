/* What libcuda and libc10_cuda answer autograd's engine, for backward passes of fake CUDA tensors without a driver.
   Preloaded. There are no devices until `fake_devices` is set, and none has a context. */
#include <string.h>
signed char fake_devices = 0;
signed char _ZN3c104cuda12device_countEv(void) { return fake_devices; }
int _ZN3c104cuda17hasPrimaryContextEa(signed char device) { return 0; }

static int success(void) { return 0; }
static int no_device(void) { return 100; }
static void *entry(const char *name) {
  return !strcmp(name, "cuInit") || !strcmp(name, "cuDeviceGetCount") ? (void *)no_device : (void *)success;
}
int cuInit(unsigned flags) { return 100; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDeviceGetCount(int *count) { *count = 0; return 100; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags) {
  *found = entry(name);
  return 0;
}
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status) {
  *found = entry(name);
  if (status) *status = 0;
  return 0;
}
