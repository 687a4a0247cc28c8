// The little that these tests need of a test framework. It is written here rather than taken from one so that the tests
// build wherever the library does, with nothing to install or to download.
//
//     TEST(name) { CHECK(condition) << "what the values were"; }
//     int main(int argc, char **argv) { return check::run(argc, argv); }      arguments: names of the tests to run
#pragma once
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
    const char *name;
    void (*body)();
};

inline std::vector<Test> &tests() {
    static std::vector<Test> all;
    return all;
}

inline int &failures() {
    static int count = 0;
    return count;
}

struct Registration {
    Registration(const char *name, void (*body)()) { tests().push_back({name, body}); }
};

// Prints the failure when the statement that it is in ends.
class Failure {
public:
    Failure(const char *file, int line, const char *condition) {
        text_ << file << ":" << line << ": does not hold: " << condition << "\n    ";
    }
    Failure(const Failure &) = delete;
    ~Failure() {
        ++failures();
        std::printf("%s\n", text_.str().c_str());
        std::fflush(stdout);
    }
    template <class T>
    Failure &operator<<(const T &x) {
        text_ << x;
        return *this;
    }

private:
    std::ostringstream text_;
};

// Lets CHECK be a statement of type void, whatever is streamed into the failure.
struct Statement {
    void operator&(const Failure &) const {}
};

inline int run(int argc, char **argv) {
    int ran = 0;
    for (const Test &test : tests()) {
        bool chosen = argc <= 1;
        for (int i = 1; i < argc; ++i) chosen = chosen || std::strcmp(argv[i], test.name) == 0;
        if (!chosen) continue;
        const int before = failures();
        test.body();
        ++ran;
        std::printf("%s %s\n", failures() == before ? "ok    " : "FAILED", test.name);
        std::fflush(stdout);
    }
    if (ran == 0) std::printf("no test of that name\n");
    return failures() == 0 && ran > 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                            \
    static void test_##name();                                                \
    static const check::Registration registration_##name(#name, test_##name); \
    static void test_##name()

#define CHECK(condition) (condition) ? void(0) : check::Statement() & check::Failure(__FILE__, __LINE__, #condition)
