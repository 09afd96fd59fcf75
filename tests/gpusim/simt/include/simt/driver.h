// Reads a launch from a file, runs one kernel of a table, writes the buffers back. See runner.py for the format.
#pragma once
#include <fstream>
#include <type_traits>

#include "simt/runtime.h"

namespace simt {

// Little-endian file: grid 3 x u32, block 3 x u32, shared bytes u32, number of arguments u32, then per argument
// kind u32 (0 scalar, 1 buffer, 2 the buffer of the earlier argument number `size`), offset in bytes u32, size u64,
// bytes.
struct Argument {
    bool is_buffer = false, shares = false;
    uint32_t offset = 0;
    uint64_t size = 0;
    unsigned char* bytes = nullptr;  // exactly `size` long, on a 256-byte boundary like a device allocation
};

struct Launch {
    dim3 grid, threads;
    uint32_t shared_bytes = 0;
    std::vector<Argument> arguments;
};

template <class T>
T take(std::istream& file) {
    T value{};
    file.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
}

inline Launch read_launch(const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail("cannot read %s", path);
    Launch launch;
    for (unsigned* size : {&launch.grid.x, &launch.grid.y, &launch.grid.z, &launch.threads.x, &launch.threads.y,
                           &launch.threads.z, &launch.shared_bytes})
        *size = take<uint32_t>(file);
    launch.arguments.resize(take<uint32_t>(file));
    for (Argument& argument : launch.arguments) {
        uint32_t kind = take<uint32_t>(file);
        argument.is_buffer = kind != 0;
        argument.shares = kind == 2;
        argument.offset = take<uint32_t>(file);
        argument.size = take<uint64_t>(file);
        if (argument.shares) {
            argument.bytes = launch.arguments[argument.size].bytes;
            continue;
        }
        void* memory = nullptr;
        if (posix_memalign(&memory, 256, std::max<uint64_t>(argument.size, 1))) fail("out of memory");
        argument.bytes = static_cast<unsigned char*>(memory);
        file.read(static_cast<char*>(memory), static_cast<std::streamsize>(argument.size));
    }
    return launch;
}

inline void write_buffers(const Launch& launch, const char* path) {
    std::ofstream file(path, std::ios::binary);
    for (const Argument& argument : launch.arguments)
        if (argument.is_buffer && !argument.shares)
            file.write(reinterpret_cast<const char*>(argument.bytes), static_cast<std::streamsize>(argument.size));
}

template <class Parameter>
Parameter argument_as(const Launch& launch, size_t index) {
    const Argument& argument = launch.arguments[index];
    if constexpr (std::is_pointer_v<Parameter>) {
        if (!argument.is_buffer) fail("argument %zu is a scalar, the kernel takes a pointer", index);
        return reinterpret_cast<Parameter>(argument.bytes + argument.offset);
    } else {
        if (argument.is_buffer) fail("argument %zu is a buffer, the kernel takes a scalar", index);
        if (argument.size != sizeof(Parameter))
            fail("argument %zu has %llu bytes, the kernel takes %zu", index, (unsigned long long)argument.size,
                 sizeof(Parameter));
        Parameter value;
        std::memcpy(&value, argument.bytes, sizeof value);
        return value;
    }
}

template <class... Parameters, size_t... Index>
void run(void (*kernel)(Parameters...), const Launch& launch, unsigned seed, std::index_sequence<Index...>) {
    if (launch.arguments.size() != sizeof...(Parameters))
        fail("%zu arguments given, the kernel takes %zu", launch.arguments.size(), sizeof...(Parameters));
    simt::launch(launch.grid, launch.threads, launch.shared_bytes, seed,
                 [&] { kernel(argument_as<Parameters>(launch, Index)...); });
}

struct Entry {
    const char* name;
    std::function<void(const Launch&, unsigned)> call;
};

template <class... Parameters>
Entry entry(const char* name, void (*kernel)(Parameters...)) {
    return {name, [kernel](const Launch& launch, unsigned seed) {
                run(kernel, launch, seed, std::index_sequence_for<Parameters...>{});
            }};
}

// usage: program KERNEL SEED LAUNCH-FILE RESULT-FILE
inline int drive(int count, char** values, const std::vector<Entry>& table) {
    if (count != 5) fail("usage: program KERNEL SEED LAUNCH-FILE RESULT-FILE");
    for (const Entry& entry : table)
        if (!std::strcmp(entry.name, values[1])) {
            Launch launch = read_launch(values[3]);
            entry.call(launch, static_cast<unsigned>(std::strtoul(values[2], nullptr, 10)));
            write_buffers(launch, values[4]);
            for (Argument& argument : launch.arguments)
                if (!argument.shares) std::free(argument.bytes);
            return 0;
        }
    fail("no kernel named %s in this program", values[1]);
}

}  // namespace simt
