#pragma once

namespace fxk {
namespace cuda {

struct DeviceCount {
  int devices;
  const char* problem;  // why there are none, or null
};

struct Versions {
  int runtime, driver;  // 1000 * major + 10 * minor; driver 0: none installed
};

DeviceCount device_count();
Versions versions();

}  // namespace cuda
}  // namespace fxk
